# Python, pybind11, nvcc and CUTLASS: sets FLASH_ARCHS, FLASH_CUTLASS and enables CUDA, or leaves
# FLASH_ARCHS empty when this machine has nothing to build kernels for.
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)

execute_process(
  COMMAND ${CMAKE_COMMAND} -E env ${Python_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/toolchain.py --cmake
  OUTPUT_VARIABLE answers OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
foreach(name ARCHS NVCC NVCC_VERSION WHEEL_ROOT CUTLASS)
  string(REGEX MATCH "(^|\n)${name}=([^\n]*)" matched "${answers}")
  set(found_${name} "${CMAKE_MATCH_2}")
endforeach()

set(FLASH_ARCHS "${found_ARCHS}" CACHE STRING "GPU architectures, for example 75;80;90a")
foreach(subset VERSIONS DTYPES HEAD_DIMS DIRECTIONS)
  string(REGEX REPLACE "[, ]+" ";" asked "$ENV{FLASH_${subset}}")
  set(FLASH_${subset} "${asked}" CACHE STRING "build only these (empty: all)")
endforeach()
set(FLASH_UNPROVEN "$ENV{FLASH_UNPROVEN}" CACHE STRING
  "also build kernels whose GPU tests have not passed")
if(NOT FLASH_ARCHS)
  message(STATUS "flash: no GPU here and no FLASH_ARCHS: no kernels")
  return()
endif()
if(NOT found_NVCC)
  message(FATAL_ERROR "flash: no nvcc >= 12.4 found: install a CUDA toolkit, or the nvcc wheels "
                      "that cmake/toolchain.py lists (pip install . does this by itself)")
endif()
if(NOT found_CUTLASS)
  message(FATAL_ERROR "flash: no CUTLASS headers: pip install nvidia-cutlass, or set CUTLASS_INCLUDE")
endif()
set(FLASH_CUTLASS "${found_CUTLASS}")

# CI makes warnings, spills and serialized WGMMA errors; a user's compiler may warn of other things
# and allocate registers otherwise, so an installation only reports them.
option(FLASH_STRICT "treat warnings and ptxas findings as errors" OFF)

set(CMAKE_CUDA_COMPILER ${found_NVCC})
set(CMAKE_CUDA_ARCHITECTURES OFF)  # each version names its own
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
if(found_WHEEL_ROOT)
  set(CMAKE_CUDA_FLAGS_INIT "-L${found_WHEEL_ROOT}/lib")  # the wheels have lib/, nvcc looks in lib64/
endif()
enable_language(CUDA)

execute_process(COMMAND ${Python_EXECUTABLE} -m pybind11 --cmakedir
  OUTPUT_VARIABLE pybind11_folder OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
find_package(pybind11 3.0 CONFIG REQUIRED HINTS ${pybind11_folder})

# One nvcc takes up to 3 GB: as many at a time as 80 % of the free memory holds.
cmake_host_system_information(RESULT free_mb QUERY AVAILABLE_PHYSICAL_MEMORY)
cmake_host_system_information(RESULT cores QUERY NUMBER_OF_LOGICAL_CORES)
math(EXPR flash_jobs "${free_mb} * 8 / 10 / 3000")
if(flash_jobs GREATER cores)
  set(flash_jobs ${cores})
elseif(flash_jobs LESS 1)
  set(flash_jobs 1)
endif()
set_property(GLOBAL APPEND PROPERTY JOB_POOLS flash_nvcc=${flash_jobs})
list(JOIN FLASH_ARCHS " " archs_text)
message(STATUS "flash: kernels for ${archs_text}, ${flash_jobs} compilers at a time, nvcc ${found_NVCC}")
