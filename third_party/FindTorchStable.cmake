# torch as the LibTorch stable ABI needs it: its headers and two link names, never find_package(Torch).
#
# Result: target torch::stable, KVC_TORCH_ROOT, KVC_TORCH_VERSION. torch itself is never imported (slow) nor
# downloaded: the one of the build's Python is taken, if need be the one outside pip's build isolation.

set(_kvc_probe "
import importlib.util
spec = importlib.util.find_spec('torch')
print(spec.submodule_search_locations[0] if spec else '', end='')")

if(NOT KVC_TORCH_ROOT)
  execute_process(COMMAND "${Python_EXECUTABLE}" -c "${_kvc_probe}" OUTPUT_VARIABLE _kvc_root)
  if(NOT _kvc_root)
    execute_process(
      COMMAND "${CMAKE_COMMAND}" -E env --unset=PYTHONPATH --unset=PYTHONNOUSERSITE
              "${Python_EXECUTABLE}" -c "${_kvc_probe}"
      OUTPUT_VARIABLE _kvc_root)
  endif()
  if(NOT _kvc_root)
    message(FATAL_ERROR
      "kvcompress: no torch found to build against. Install torch>=2.11 first, then either build with "
      "`pip install --no-build-isolation .` or pass -DKVC_TORCH_ROOT=<folder of the torch package>.")
  endif()
  set(KVC_TORCH_ROOT "${_kvc_root}") # not cached: the next configure may run in another environment
endif()

if(NOT EXISTS "${KVC_TORCH_ROOT}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR "kvcompress: ${KVC_TORCH_ROOT} has no stable ABI headers; torch>=2.11 is needed.")
endif()
file(STRINGS "${KVC_TORCH_ROOT}/version.py" _kvc_line REGEX "^__version__")
string(REGEX REPLACE ".*'([^']+)'.*" "\\1" KVC_TORCH_VERSION "${_kvc_line}")
message(STATUS "kvcompress: torch ${KVC_TORCH_VERSION} (headers only)")

add_library(torch_stable INTERFACE)
add_library(torch::stable ALIAS torch_stable)
target_include_directories(torch_stable SYSTEM INTERFACE "${KVC_TORCH_ROOT}/include")
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020B000000000000)
target_link_directories(torch_stable INTERFACE "${KVC_TORCH_ROOT}/lib")
# libtorch.so defines nothing itself, but it is what pulls libtorch_cuda.so in on a CUDA build of torch.
target_link_libraries(torch_stable INTERFACE
  -Wl,--no-as-needed -ltorch_cpu -ltorch -Wl,--as-needed)
