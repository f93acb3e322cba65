// The backward pass is launched from here.
#pragma once
