#include <cuda_profiler_api.h>
#include <cupti.h>
#include <dlfcn.h>
#include <nvtx3/nvToolsExt.h>

#include "core/cuda.cuh"
#include "core/process.h"
#include "observe/profile.h"

namespace pith {

void open_profiler() {
  const string name = text("libcupti.so.%d", CUDART_VERSION / 1000);
  const char* home = getenv("CUDA_HOME");
  const string in_toolkit = string(home ? home : "/usr/local/cuda") + "/extras/CUPTI/lib64/" + name;
  void* cupti = dlopen(name.c_str(), RTLD_NOW);
  if (!cupti) cupti = dlopen(in_toolkit.c_str(), RTLD_NOW);
  if (!cupti)
    bad_input("--profile-step", text("CUPTI is missing (got %s)", dlerror()),
        "the CUDA toolkit's package cuda-cupti, or its folder in LD_LIBRARY_PATH");
  profiler() = new Profile{.cupti = cupti};
}

// A function of CUPTI's that takes just these types.
template <class... Args>
static bool call(const char* name, Args... args) {
  auto* f = reinterpret_cast<CUptiResult (*)(Args...)>(dlsym(profiler()->cupti, name));
  return f && f(args...) == CUPTI_SUCCESS;
}

constexpr auto kOurs = CUPTI_EXTERNAL_CORRELATION_KIND_CUSTOM0;

StageRange::StageRange(const Rank& rank, const Stage& s) {
  nvtxRangePushA(
      text("rank %d, micro-batch %d, layer %d: %s", rank.id, s.micro_batch, s.layer, s.name.c_str())
          .c_str());
  Profile* p = profiler();
  if (!p || !p->recording) return;
  call("cuptiActivityPushExternalCorrelationId", kOurs, u64(p->stages.size()));
  p->stages.push_back(s);
}

StageRange::~StageRange() {
  nvtxRangePop();
  if (profiler() && profiler()->recording)
    call("cuptiActivityPopExternalCorrelationId", kOurs, static_cast<u64*>(nullptr));
}

static void give_buffer(u8** buffer, size_t* size, size_t* most_records) {
  *size = 8 << 20;
  *buffer = static_cast<u8*>(malloc(*size));
  *most_records = 0;  // what fits
}

static void take_buffer(CUcontext, u32, u8* buffer, size_t, size_t used) {
  Profile& p = *profiler();
  const std::lock_guard lock(p.mutex);
  auto add = [&](const auto& r, const char* kernel) {
    p.launches.push_back({double(i64(r.start - p.begin_ns)) / 1e3, double(r.end - r.start) / 1e3,
        int(r.streamId), int(r.correlationId), kernel});
  };
  union {
    CUpti_Activity* any;
    CUpti_ActivityKernel9* kernel;
    CUpti_ActivityMemcpy5* copy;
    CUpti_ActivityMemset4* set;
    CUpti_ActivityExternalCorrelation* range;
  } r = {};
  while (call("cuptiActivityGetNextRecord", buffer, used, &r.any)) {
    const auto kind = r.any->kind;
    if (kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) add(*r.kernel, r.kernel->name);
    if (kind == CUPTI_ACTIVITY_KIND_MEMCPY) add(*r.copy, "copy");
    if (kind == CUPTI_ACTIVITY_KIND_MEMSET) add(*r.set, "memset");
    if (kind == CUPTI_ACTIVITY_KIND_EXTERNAL_CORRELATION)
      p.stage_of[int(r.range->correlationId)] = int(r.range->externalId);
  }
  free(buffer);
}

// False where a tool such as nsys holds CUPTI.
static bool for_kinds(const char* enable_or_disable) {
  bool done = true;
  for (const auto kind : {CUPTI_ACTIVITY_KIND_EXTERNAL_CORRELATION, CUPTI_ACTIVITY_KIND_RUNTIME,
           CUPTI_ACTIVITY_KIND_DRIVER, CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL,
           CUPTI_ACTIVITY_KIND_MEMCPY, CUPTI_ACTIVITY_KIND_MEMSET})
    done = done && call(enable_or_disable, kind);
  return done;
}

void begin_profile(Rank& rank) {
  Profile& p = *profiler();
  cuda_sync(cuda_of(rank));
  p.stages = {{"background"}};  // of other threads
  p.recording = call("cuptiActivityRegisterCallbacks", give_buffer, take_buffer) &&
                for_kinds("cuptiActivityEnable");
  cuda_check(cudaProfilerStart());
  call("cuptiGetTimestamp", &p.begin_ns);
}

Profile& end_profile(Rank& rank) {
  Profile& p = *profiler();
  cuda_sync(cuda_of(rank));
  u64 end_ns = p.begin_ns;
  call("cuptiGetTimestamp", &end_ns);
  cuda_check(cudaProfilerStop());
  p.us = double(end_ns - p.begin_ns) / 1e3;
  p.step = rank.status->step;
  p.recording = false;
  for_kinds("cuptiActivityDisable");
  call("cuptiActivityFlushAll", u32(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED));
  for (Launch& l : p.launches) l.stage = p.stage_of[l.stage];
  return p;
}

}
