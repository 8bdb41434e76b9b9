#include "ops/cuda_engine.h"

#include <dlfcn.h>

#include <filesystem>

#include "ops/cuda/module.h"

namespace krait {
namespace {

// The folder that this library was loaded from.
std::filesystem::path library_folder() {
  Dl_info info{};
  KRAIT_CHECK(dladdr(reinterpret_cast<const void*>(&library_folder), &info) != 0);
  return std::filesystem::absolute(info.dli_fname).parent_path();
}

const cuda::Module& load_module() {
  const std::filesystem::path path = library_folder() / "libkrait_cuda.so";
  std::error_code error;
  if (!std::filesystem::exists(path, error))
    throw Error("built without CUDA", path.string(), "the module of the CUDA engine",
                "no such file");
  void* const handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) throw Error("cannot load the CUDA engine", path.string(), "", dlerror());
  const auto entry =
      reinterpret_cast<decltype(&krait_cuda_module)>(dlsym(handle, "krait_cuda_module"));
  if (!entry || entry()->version != cuda::kModuleVersion)
    throw Error("the CUDA engine is of another build", path.string());
  return *entry();
}

const cuda::Module& module() {
  static const cuda::Module& loaded = load_module();
  return loaded;
}

}  // namespace

std::vector<GpuInfo> list_gpus() { return module().list_gpus(); }

const Engine& cuda_engine() { return module().engine(); }

}  // namespace krait
