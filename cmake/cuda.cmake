# The CUDA module _C_cuda: built when nvcc is found, or as PROTOKEN_CUDA says (0: never, 1: a missing nvcc is an error).
#
# Machine code for sm_80, sm_90a and sm_100, and PTX for what comes later. cudart is linked statically, so the module
# needs nothing but the driver. PROTOKEN_CUDA_ARCHITECTURES overrides the list (CMake's notation, "90a-real;...").
if(PROTOKEN_CUDA STREQUAL "0")
  message(STATUS "protoken: no CUDA module (PROTOKEN_CUDA=0)")
  return()
endif()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(PROTOKEN_CUDA STREQUAL "1")
    message(FATAL_ERROR "protoken: PROTOKEN_CUDA=1, but no working nvcc was found")
  endif()
  message(STATUS "protoken: no nvcc, so no CUDA module")
  return()
endif()

set(PROTOKEN_CUDA_ARCHITECTURES "80-real;90a-real;100-real;100-virtual" CACHE STRING "Targets of the CUDA module")
set(CMAKE_CUDA_ARCHITECTURES "${PROTOKEN_CUDA_ARCHITECTURES}")
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)

pybind11_add_module(_C_cuda NO_EXTRAS
  csrc/cuda_bindings.cpp
  csrc/cuda_device.cpp
  csrc/capture_append.cu
  csrc/client_scores.cu
  csrc/client_scores_bf16.cu
  csrc/client_scores_e4m3.cu
  csrc/client_scores_f16.cu
  csrc/client_scores_f32.cu
  csrc/client_scores_half.cu
  csrc/client_scores_i8.cu
  csrc/client_scores_lowrank.cu
  csrc/client_totals.cu
  csrc/relevance_head.cu)
target_include_directories(_C_cuda PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
target_compile_options(_C_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CXX>:-O3 -Wall -Wextra>
  $<$<COMPILE_LANGUAGE:CUDA>:-O3 --threads=3 -Xptxas=-v>)
set_target_properties(_C_cuda PROPERTIES
  CUDA_RUNTIME_LIBRARY Static
  CUDA_SEPARABLE_COMPILATION OFF
  INTERPROCEDURAL_OPTIMIZATION OFF
  LIBRARY_OUTPUT_DIRECTORY "${PROTOKEN_OUTPUT_DIR}")
