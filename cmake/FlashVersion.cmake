# flash_add_version(name NAMESPACE v2 OLDEST_ARCH 80 | ONLY_ARCH 90a FORWARD ... BACKWARD ...
#                   UNPROVEN_FORWARD ... UNPROVEN_BACKWARD ...):
# the target `name`, a Python module name/_kernels.so built from one translation unit per instance.

set(flash_element_fp16 fp16)
set(flash_element_bf16 bf16)
set(flash_element_fp32 fp32)
set(flash_element_e4m3 e4m3)

# The requested architectures that this version can use, as nvcc options: machine code for each,
# and PTX of the oldest one for GPUs that are newer than all of them.
function(flash_gencode result oldest only)
  set(options)
  set(lowest 9999)
  foreach(arch IN LISTS FLASH_ARCHS)
    string(REGEX REPLACE "[^0-9]" "" number ${arch})
    if(only)
      if(arch STREQUAL only)
        list(APPEND options "--generate-code=arch=compute_${arch},code=sm_${arch}")
        set_property(GLOBAL APPEND PROPERTY flash_served ${arch})
      endif()
    elseif(number GREATER_EQUAL oldest)
      list(APPEND options "--generate-code=arch=compute_${number},code=sm_${number}")
      set_property(GLOBAL APPEND PROPERTY flash_served ${arch})
      if(number LESS lowest)
        set(lowest ${number})
      endif()
    endif()
  endforeach()
  if(options AND NOT only)
    list(APPEND options "--generate-code=arch=compute_${lowest},code=compute_${lowest}")
  endif()
  set(${result} ${options} PARENT_SCOPE)
endfunction()

# True when FLASH_<subset> is empty or holds the value, which is one that it may hold.
function(flash_wanted result subset value)
  set_property(GLOBAL APPEND PROPERTY flash_offered_${subset} ${value})
  if(NOT FLASH_${subset} OR value IN_LIST FLASH_${subset})
    set(${result} TRUE PARENT_SCOPE)
  else()
    set(${result} FALSE PARENT_SCOPE)
  endif()
endfunction()

# To be called last: whoever misspells what to build is told, not left without it.
function(flash_check_wanted)
  foreach(subset VERSIONS DTYPES HEAD_DIMS DIRECTIONS)
    get_property(offered GLOBAL PROPERTY flash_offered_${subset})
    list(REMOVE_DUPLICATES offered)
    foreach(value IN LISTS FLASH_${subset})
      if(NOT value IN_LIST offered)
        list(JOIN offered " " text)
        message(FATAL_ERROR "flash: FLASH_${subset} names ${value}; there is ${text}")
      endif()
    endforeach()
  endforeach()
  get_property(served GLOBAL PROPERTY flash_served)
  foreach(arch IN LISTS FLASH_ARCHS)
    if(NOT arch IN_LIST served)
      message(WARNING "flash: no version has kernels for ${arch}")
    endif()
  endforeach()
endfunction()

# Writes one translation unit for each wanted instance; returns their paths and C++ types.
function(flash_instances sources types name namespace direction)
  set(files)
  set(list_of_types)
  string(SUBSTRING ${direction} 0 1 initial)
  string(TOUPPER ${initial} initial)
  string(SUBSTRING ${direction} 1 -1 rest)
  set(FLASH_PARAMS ${initial}${rest}Params)
  set(FLASH_DIRECTION ${direction})
  set(FLASH_FOLDER ${name})
  set(FLASH_SPACE ${namespace})
  flash_wanted(direction_wanted DIRECTIONS ${direction})
  foreach(instance IN LISTS ARGN)
    string(REPLACE ":" ";" parts ${instance})
    list(GET parts 0 dtype)
    list(GET parts 1 head_dim)
    flash_wanted(dtype_wanted DTYPES ${dtype})
    flash_wanted(dim_wanted HEAD_DIMS ${head_dim})
    if(direction_wanted AND dtype_wanted AND dim_wanted)
      list(JOIN parts ", " arguments)
      set(FLASH_INSTANCE "Instance<${arguments}>")
      set(FLASH_PROBE "")
      if(direction STREQUAL "forward")
        set(FLASH_PROBE "template cudaError_t probe_forward<Built>();")
      endif()
      list(JOIN parts "_" suffix)
      set(file ${CMAKE_CURRENT_BINARY_DIR}/${name}/${direction}_${suffix}.cu)
      configure_file(${CMAKE_CURRENT_FUNCTION_LIST_DIR}/instance.cu.in ${file} @ONLY)
      list(APPEND files ${file})
      list(APPEND list_of_types ${FLASH_INSTANCE})
    endif()
  endforeach()
  list(JOIN list_of_types ", " joined)
  set(${sources} ${files} PARENT_SCOPE)
  set(${types} "${joined}" PARENT_SCOPE)
endfunction()

function(flash_add_version name)
  cmake_parse_arguments(arg "" "NAMESPACE;OLDEST_ARCH;ONLY_ARCH" "FORWARD;BACKWARD;UNPROVEN_FORWARD;UNPROVEN_BACKWARD" ${ARGN})
  if(FLASH_UNPROVEN)
    list(APPEND arg_FORWARD ${arg_UNPROVEN_FORWARD})
    list(APPEND arg_BACKWARD ${arg_UNPROVEN_BACKWARD})
  endif()
  flash_wanted(version_wanted VERSIONS ${name})
  flash_gencode(gencode "${arg_OLDEST_ARCH}" "${arg_ONLY_ARCH}")
  flash_instances(forward FLASH_FORWARD ${name} ${arg_NAMESPACE} forward ${arg_FORWARD})
  flash_instances(backward FLASH_BACKWARD ${name} ${arg_NAMESPACE} backward ${arg_BACKWARD})
  if(NOT version_wanted OR NOT gencode OR NOT (forward OR backward))
    message(STATUS "flash: ${name}: nothing to build")
    return()
  endif()

  set(generated ${CMAKE_CURRENT_BINARY_DIR}/${name})
  set(FLASH_SPACE ${arg_NAMESPACE})
  configure_file(${CMAKE_CURRENT_FUNCTION_LIST_DIR}/instances.h.in ${generated}/instances.h @ONLY)

  add_library(${name}_kernels OBJECT ${forward} ${backward})
  target_include_directories(${name}_kernels PRIVATE ${CMAKE_CURRENT_SOURCE_DIR} ${generated})
  target_include_directories(${name}_kernels SYSTEM PRIVATE ${FLASH_CUTLASS})
  target_compile_definitions(${name}_kernels PRIVATE FLASH_NAMESPACE=${arg_NAMESPACE})
  target_compile_options(${name}_kernels PRIVATE ${gencode} -O3 --expt-relaxed-constexpr
    $<$<BOOL:${FLASH_STRICT}>:-Werror=all-warnings> -Xptxas=-v -Xcompiler=-Wall
    --diag-suppress=128  # "loop is not reachable": where `if constexpr` leaves one instance early
    -Xfatbin=-compress-all)
  set_target_properties(${name}_kernels PROPERTIES
    POSITION_INDEPENDENT_CODE ON CUDA_VISIBILITY_PRESET hidden JOB_POOL_COMPILE flash_nvcc
    CUDA_COMPILER_LAUNCHER
      "${Python_EXECUTABLE};${CMAKE_CURRENT_FUNCTION_LIST_DIR}/compile.py;--strict=${FLASH_STRICT}")

  python_add_library(${name} MODULE WITH_SOABI common/backend.cpp common/binding.cpp)
  target_link_libraries(${name} PRIVATE ${name}_kernels pybind11::headers)
  target_include_directories(${name} PRIVATE ${CMAKE_CURRENT_SOURCE_DIR} ${generated}
    ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  target_compile_definitions(${name} PRIVATE
    FLASH_NAMESPACE=${arg_NAMESPACE} FLASH_MODULE=_kernels)
  target_compile_options(${name} PRIVATE -Wall)
  set_target_properties(${name} PROPERTIES
    OUTPUT_NAME _kernels CXX_STANDARD 17 CXX_VISIBILITY_PRESET hidden
    LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/flash/${name})
  target_link_options(${name} PRIVATE -Wl,--exclude-libs,ALL -s)

  list(JOIN gencode " " gencode_text)
  file(WRITE ${generated}/_kernels.json "{\"compiler\": \"nvcc ${CMAKE_CUDA_COMPILER_VERSION}\", "
    "\"architectures\": \"${FLASH_ARCHS}\", \"options\": \"${gencode_text}\"}\n")
  install(TARGETS ${name} LIBRARY DESTINATION flash/${name})
  install(FILES ${generated}/_kernels.json DESTINATION flash/${name})
  message(STATUS "flash: ${name}: ${gencode_text}")
endfunction()

# The quantizer of v3: a module of its own, for it serves no attention call.
function(flash_add_quantizer version)
  flash_gencode(gencode "" 90a)
  flash_wanted(version_wanted VERSIONS ${version})
  if(NOT version_wanted OR NOT gencode)
    return()
  endif()
  set(name ${version}_quantize)
  python_add_library(${name} MODULE WITH_SOABI
    ${version}/fp8_quantize.cu ${version}/fp8_quantize_binding.cpp)
  target_link_libraries(${name} PRIVATE pybind11::headers)
  target_include_directories(${name} PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}
    ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  target_compile_definitions(${name} PRIVATE FLASH_MODULE=_quantize)
  target_compile_options(${name} PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:${gencode};-O3;--expt-relaxed-constexpr;-Xptxas=-v;-Xcompiler=-Wall>
    $<$<AND:$<COMPILE_LANGUAGE:CUDA>,$<BOOL:${FLASH_STRICT}>>:-Werror=all-warnings>
    $<$<COMPILE_LANGUAGE:CXX>:-Wall>)
  set_target_properties(${name} PROPERTIES
    OUTPUT_NAME _quantize CXX_STANDARD 17 CXX_VISIBILITY_PRESET hidden CUDA_VISIBILITY_PRESET hidden
    LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/flash/${version}
    CUDA_COMPILER_LAUNCHER
      "${Python_EXECUTABLE};${CMAKE_CURRENT_FUNCTION_LIST_DIR}/compile.py;--strict=${FLASH_STRICT}")
  target_link_options(${name} PRIVATE -Wl,--exclude-libs,ALL -s)
  install(TARGETS ${name} LIBRARY DESTINATION flash/${version})
endfunction()
