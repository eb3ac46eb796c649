// config: a run, as a TOML file and --set overrides fill it. Device and number of ranks are options
// of the command.
#pragma once
#include "engine/optimizer.h"

namespace pith {

// What each key means, its unit and limits: docs/configuration.md, which a test keeps complete.
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
    int64_t sequence_length = 0;
    uint64_t seed = 1234;
    bool shuffle = true;
    int64_t max_epochs = 1;
    double heldout_fraction = 0;
    bool document_mask = false;
  } data;
  struct {
    int64_t steps = 0, global_batch_size = 0, micro_batch_size = 1;
    string precision = "auto", on_nonfinite = "stop";
    int64_t eval_interval = 0, eval_batches = 0, log_interval = 1;
  } train;
  struct {
    double lr = 0, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0.1, max_grad_norm = 1;
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
    int64_t interval = 0, keep = 3;
  } checkpoint;
};

// Reads `path`, applies `overrides` ("a.b=c", later ones win), and validates. Relative paths in the
// file are relative to the file's folder, others to the working directory; the result's are
// absolute. Exit code 2 naming what is wrong.
RunConfig load_run_config(const string& path, const vector<string>& overrides);
// The rules that need no model, data or mesh. Exit code 2.
void validate(const RunConfig& config);
// The resolved configuration as TOML; reading it back gives the same.
string to_toml(const RunConfig& config);
// Whether a resumed run may change the key: what does not change the training itself, how long it
// takes, its learning rate, and where files lie (their contents are compared apart).
bool may_change_on_resume(const string& key);

}  // namespace pith
