// Runs one compiled kernel: run_kernel LIBRARY SYMBOL ARGUMENTS. It stands for TVM's runtime, of which kernels need next to nothing.
//
// The file of arguments is mapped and the kernel computes in it: int64 count, then per argument six int64 (kind, value or offset of the
// data, bits of a number, numbers, bits of a float64 that is the value, 0). Kind: 0 an integer, 1 a float, 2 a tensor of floats, 3 of integers.
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <tvm/ffi/c_api.h>
#include <unistd.h>

namespace {

[[noreturn]] void fail(const char* what, const char* more) {
  fprintf(stderr, "run_kernel: %s %s\n", what, more);
  exit(1);
}

// Declared as in tvm/runtime/c_backend_api.h.
struct Environment {
  void* sync_handle;
  int32_t num_task;
};
using Lambda = int (*)(int task, Environment* environment, void* data);

int launch(Lambda run, void* data, int tasks) {
  Environment environment{nullptr, tasks ? tasks : 2};
  for (int task = 0; task < environment.num_task; ++task)
    if (int failure = run(task, &environment, data)) return failure;
  return 0;
}

void* allocate(int, int, uint64_t bytes, int, int) { return aligned_alloc(64, (bytes + 63) / 64 * 64); }

int release(int, int, void* memory) {
  free(memory);
  return 0;
}

void provide(void* library, const char* pointer, void* function) {
  if (void* found = dlsym(library, pointer)) *static_cast<void**>(found) = function;
}

struct Argument {
  int64_t kind, value, bits, count, floating, unused;
};

}  // namespace

extern "C" void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  fprintf(stderr, "run_kernel: %s: ", kind);
  for (int32_t part = 0; part < count; ++part)
    if (parts[part]) fputs(parts[part], stderr);
  fputc('\n', stderr);
}

int main(int count, char** given) {
  if (count != 4) fail("expected LIBRARY SYMBOL ARGUMENTS", "");
  void* library = dlopen(given[1], RTLD_NOW);
  if (!library) fail("cannot load", dlerror());
  provide(library, "__TVMBackendParallelLaunch", reinterpret_cast<void*>(&launch));
  provide(library, "__TVMBackendAllocWorkspace", reinterpret_cast<void*>(&allocate));
  provide(library, "__TVMBackendFreeWorkspace", reinterpret_cast<void*>(&release));
  auto kernel = reinterpret_cast<TVMFFISafeCallType>(dlsym(library, given[2]));
  if (!kernel) fail("there is no symbol", given[2]);

  int file = open(given[3], O_RDWR);
  struct stat size;
  if (file < 0 || fstat(file, &size)) fail("cannot open", given[3]);
  char* memory = static_cast<char*>(mmap(nullptr, size.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0));
  if (memory == MAP_FAILED) fail("cannot map", given[3]);

  int64_t number = *reinterpret_cast<int64_t*>(memory);
  auto* list = reinterpret_cast<Argument*>(memory + 8);
  auto* arguments = static_cast<TVMFFIAny*>(calloc(number, sizeof(TVMFFIAny)));
  auto* tensors = static_cast<DLTensor*>(calloc(number, sizeof(DLTensor)));
  for (int64_t i = 0; i < number; ++i) {
    const Argument& one = list[i];
    if (one.kind == 0) {
      arguments[i].type_index = kTVMFFIInt;
      arguments[i].v_int64 = one.value;
    } else if (one.kind == 1) {
      arguments[i].type_index = kTVMFFIFloat;
      memcpy(&arguments[i].v_float64, &one.floating, sizeof(double));
    } else {
      DLTensor& tensor = tensors[i];
      tensor.data = memory + one.value;
      tensor.device = {kDLCPU, 0};
      tensor.ndim = 1;
      tensor.dtype = {static_cast<uint8_t>(one.kind == 2 ? kDLFloat : kDLInt), static_cast<uint8_t>(one.bits), 1};
      tensor.shape = &list[i].count;
      arguments[i].type_index = kTVMFFIDLTensorPtr;
      arguments[i].v_ptr = &tensor;
    }
  }
  TVMFFIAny result{};
  if (kernel(nullptr, arguments, static_cast<int32_t>(number), &result)) fail("failed:", given[2]);
  return msync(memory, size.st_size, MS_SYNC) ? 1 : 0;
}
