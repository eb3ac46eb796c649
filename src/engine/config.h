// config: a run, as a TOML file and --set overrides fill it. Every key, its unit and default are
// here; an unknown key is refused with the nearest known one.
// defines: RunConfig, load_run_config, set_key, to_toml, validate
#pragma once
#include <string>
#include <vector>

#include "engine/balance_loss.h"
#include "engine/lr_schedule.h"

namespace pith {

enum class OnNonfinite : uint8_t { Stop, Skip };

struct RunConfig {
    struct {
        std::string folder = "runs/default";  // everything the run writes
    } run;
    struct {
        std::string config;     // Hugging Face config.json; required
        std::string init_from;  // weights only: a Hugging Face folder or a checkpoint; empty: random
        double init_std = 0.02;
    } model;
    struct {
        std::string path;             // folder or .bin file of `pith tokenize`; required
        int64_t sequence_length = 0;  // tokens a sample; required
        uint64_t seed = 1234;         // of initialisation and data order
        int64_t max_epochs = 1;       // passes over the training samples that a run may take
        double heldout_fraction = 0;  // of documents, kept out of training and used by evaluation
        bool document_mask = false;   // attention and positions stay inside a document
    } data;
    struct {
        int64_t steps = 0;               // optimiser steps; required
        int64_t global_batch_size = 0;   // sequences a step over all ranks; required
        int64_t micro_batch_size = 1;    // sequences a rank and micro-batch
        std::string precision = "auto";  // "fp32", "bf16"; auto: bf16 on a GPU, fp32 on the CPU
        std::string on_nonfinite = "stop";  // "stop", or "skip" the update of such a step
        int64_t eval_interval = 0;       // steps between evaluations; 0: never
        int64_t eval_batches = 0;        // global batches an evaluation reads; 0: all held-out data
        int64_t log_interval = 1;        // steps between step lines
    } train;
    struct {
        double lr = 0;  // peak; required
        double beta1 = 0.9, beta2 = 0.999, eps = 1e-8;
        double weight_decay = 0.1;
        double max_grad_norm = 1.0;  // global-norm clipping; 0: off
    } optimizer;
    LrSchedule lr_schedule;
    struct {
        std::string balance_loss = "none";  // "micro-batch", "sequence", "global-batch"
        double balance_coefficient = 0;
        std::string force;  // "balanced": round-robin experts, for benchmarks only
    } router;
    struct {
        std::string schedule = "auto";  // "1f1b", "dualpipev"
        int pp = 1, cp = 1, ep = 1;     // dp is what is left of the ranks
        int dp_replicate = 1;           // > 1: weights replicated (hsdp)
        std::string gather = "step";    // or "layer": free weights after each use
        double timeout_s = 120;         // longest wait for another rank after step 1
    } parallel;
    struct {
        int64_t interval = 0;  // steps between saves; 0: only at the end and when stopped
        int64_t keep = 3;      // newest checkpoints kept; 0: all
    } checkpoint;
};

// Reads `path`, then applies `overrides` ("a.b=c"). Relative paths in the file are relative to the
// file's folder; those of overrides to the working directory. Exit code 2 on anything wrong.
RunConfig load_run_config(const std::string& path, const std::vector<std::string>& overrides);
// Rules that need no model or data: ranges, required keys, enumerations. Exit code 2.
void validate(const RunConfig& config);
// The resolved configuration as TOML; reading it back gives the same.
std::string to_toml(const RunConfig& config);
// Keys whose values differ, as "train.steps: 10 -> 20".
struct ConfigDifference {
    std::string key, before, after;
};
std::vector<ConfigDifference> differences(const RunConfig& before, const RunConfig& after);
// Whether a resumed run may change the key: steps, learning rate, intervals, layout.
bool may_change_on_resume(const std::string& key);

}  // namespace pith
