// config: a run, as a TOML file and --set overrides fill it. Every key, its unit and default are
// here; an unknown key is refused with the nearest known one. Device and number of ranks are
// options of the command, not of the run.
// defines: RunConfig, load_run_config, validate, to_toml, may_change_on_resume
#pragma once

#include "engine/lr_schedule.h"

namespace pith {

struct RunConfig {
  struct {
    string folder = "runs/default";  // everything the run writes
  } run;
  struct {
    string config;  // Hugging Face config.json; required
    // Weights to begin with: a Hugging Face folder or a checkpoint; empty: random ones.
    string init_from;
    double init_std = 0.02;
  } model;
  struct {
    string path;                  // folder or .bin file of `pith tokenize`; required
    int64_t sequence_length = 0;  // tokens a sample; required
    uint64_t seed = 1234;         // of initialisation and data order
    bool shuffle = true;          // each epoch a permutation of its own; false: corpus order
    int64_t max_epochs = 1;       // passes over the training samples that a run may take
    double heldout_fraction = 0;  // of documents, kept out of training and used by evaluation
    bool document_mask = false;   // attention, positions and labels stay inside a document
  } data;
  struct {
    int64_t steps = 0;              // optimiser steps; required
    int64_t global_batch_size = 0;  // sequences a step over all ranks; required
    int64_t micro_batch_size = 1;   // sequences a rank and micro-batch
    string precision = "auto";      // "fp32", "bf16"; auto: bf16 on a GPU, fp32 on the CPU
    string on_nonfinite = "stop";   // "stop", or "skip" the update of such a step
    int64_t eval_interval = 0;      // steps between evaluations; 0: never
    int64_t eval_batches = 0;       // global batches an evaluation reads; 0: all held-out data
    int64_t log_interval = 1;       // steps between step lines
  } train;
  struct {
    double lr = 0;  // peak; required
    double beta1 = 0.9, beta2 = 0.999, eps = 1e-8;
    double weight_decay = 0.1;
    double max_grad_norm = 1.0;  // global-norm clipping; 0: off
  } optimizer;
  LrSchedule lr_schedule;
  struct {
    string balance_loss = "none";  // "micro-batch", "sequence", "global-batch"
    double balance_coefficient = 0;
    string force = "none";  // "balanced": round-robin experts, for benchmarks only
  } router;
  struct {
    string schedule = "auto";        // "1f1b", "dualpipev"; auto: 1f1b at pp = ep = 1
    int pp = 1, cp = 1, ep = 1;      // dp is what is left of the ranks
    int dp_replicate = 1;            // > 1: weights replicated over so many parts of dp (hsdp)
    int weight_grad_batch = 1;       // micro-batches whose weight gradients are taken together
    string gather = "step";          // or "layer": free weights after each use
    double timeout_s = 120;          // longest wait for another rank after step 1, seconds
    double startup_timeout_s = 600;  // and before
  } parallel;
  struct {
    int64_t interval = 0;  // steps between saves; 0: only at the end and when stopped
    int64_t keep = 3;      // newest checkpoints kept; 0: all
  } checkpoint;
};

// Reads `path`, applies `overrides` ("a.b=c", later ones win), and validates. Relative paths in the
// file are relative to the file's folder, those of overrides and defaults to the working directory;
// in the result all are absolute. Exit code 2 on anything wrong: unknown keys (with the nearest
// known one), wrong types, values out of range, required keys that are missing.
RunConfig load_run_config(const string& path, const vector<string>& overrides);
// Rules that need no model, data or mesh: required keys, ranges, enumerations, and keys that do not
// go together. Exit code 2.
void validate(const RunConfig& config);
// The resolved configuration as TOML; reading it back gives the same.
string to_toml(const RunConfig& config);
// Whether a resumed run may change the key: what does not change the training itself, how long it
// takes, its learning rate, and where files lie (their contents are compared apart).
bool may_change_on_resume(const string& key);

}  // namespace pith
