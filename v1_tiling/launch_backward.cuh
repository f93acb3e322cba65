// The backward call of this version, from parameters to grid.
#pragma once

#include "common/backend.h"
#include "common/launch.cuh"

namespace flash::v1 {}  // namespace flash::v1
