// The pybind11 module kvcompress._C: what was built, and planners over host data. No tensor code
// here.
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "kvcompress build facts and host-side planners (no tensors)";
  py::dict build;
  build["version"] = KVC_VERSION;
  build["cuda"] = KVC_CUDA_VERSION;  // "" in a CPU-only build
  build["cuda_architectures"] = KVC_CUDA_ARCHITECTURES;
  build["compiler"] = KVC_COMPILER;
  build["torch"] = KVC_TORCH_VERSION;  // whose headers; the binary runs on every torch from 2.11 on
  build["build_type"] = KVC_BUILD_TYPE;
  m.attr("build") = build;
}
