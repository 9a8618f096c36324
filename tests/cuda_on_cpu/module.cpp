// Registers the CUDA operators with emulated kernels as torch.ops.sgl_ops_emulated. The Python module of this file
// controls the emulator.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include "../../csrc/cuda/launch.h"
#include "../../csrc/schema.h"
#include "emulated_runtime.h"

namespace sgl {
namespace cuda {
uint32_t exchange_counters_taken(uint32_t count);  // launch.cu
}
}  // namespace sgl

STABLE_TORCH_LIBRARY(sgl_ops_emulated, m) { sgl::define_operators(m); }

PYBIND11_MODULE(sgl_ops_emulated, m) {
  m.def("set_schedule", &emulator::set_schedule);
  m.def("set_resident", &emulator::set_resident);
  m.def("set_multiprocessors", [](int n) { emulated::multiprocessors = n; });
  m.def("set_capturing", [](bool capturing) { emulated::capturing = capturing; });
  m.def("exchange_counters_taken", &sgl::cuda::exchange_counters_taken);
  m.def("quotient_of", [](uint32_t n, uint32_t by) { return sgl::cuda::quotient_of(n, sgl::cuda::divisor_of(by)); });
  m.def("set_stream_id", [](unsigned long long id) { emulated::stream_id = id; });
  m.def("fail_next_call", [](int error) { emulated::next_error = static_cast<cudaError_t>(error); });
  m.def("last_error", [] { return static_cast<int>(cudaGetLastError()); });
}
