#pragma once
#include "ops/ops.h"

namespace pith {

struct LrSchedule {
  string kind = "constant";  // "wsd" (warm-up, stable, decay), "cosine"
  double warmup_ratio = 0, decay_ratio = 0.1;
  string decay_shape = "cosine";
  double start_lr = 0, final_lr = 0;
};

// docs/configuration.md explains the keys.
struct RunConfig {
  struct {
    string folder = "runs/default";
  } run;
  struct {
    string config, init_from;
    double init_std = 0.02;
  } model;
  struct {
    string path;
    i64 sequence_length = 0;
    u64 seed = 1234;
    bool shuffle = true;
    i64 max_epochs = 1;
    double heldout_fraction = 0;
    bool document_mask = false;
  } data;
  struct {
    i64 steps = 0, global_batch_size = 0, micro_batch_size = 1;
    string on_nonfinite = "stop";
    string precision = "auto";  // "bf16", "fp32"; auto: bf16 on a GPU
    i64 eval_interval = 0, log_interval = 1;
    double peak_tflops = 0;  // of all devices; 0: unknown, no MFU
  } train;
  struct : AdamW {
    double max_grad_norm = 1;
  } optimizer;
  LrSchedule lr_schedule;
  struct {
    string balance_loss = "none";
    double balance_coefficient = 0;
    string force = "none";
  } router;
  struct {
    string schedule = "auto";
    int pp = 1, cp = 1, ep = 1, dp_replicate = 1, weight_grad_batch = 1;
    string gather = "step";
    double timeout_s = 120, startup_timeout_s = 600;
  } parallel;
  struct {
    i64 interval = 0, keep = 3;
  } checkpoint;
};

// Paths in the file are relative to its folder, those of overrides ("a.b=c") to the working
// directory. Exit code 2.
RunConfig load_run_config(const string& path, const vector<string>& overrides);
void validate(const RunConfig& config);
string to_toml(const RunConfig& config);
bool may_change_on_resume(const string& key);

}
