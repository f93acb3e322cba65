// The backward call of this version, from parameters to grid.
#pragma once

#include "common/backend.h"
#include "common/launch.cuh"

namespace flash::v2 {}  // namespace flash::v2
