#include "observe/profile.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <sstream>

#include "core/json.h"

namespace pith {

static int kind(const char* name) { return kind_of_kernel(name); }

TEST(Profile, KindsOfKernels) {
  const auto kinds = [](int of, std::initializer_list<const char*> names) {
    for (const char* name : names) EXPECT_EQ(kind(name), of) << name;
  };
  kinds(
      0, {"nvjet_tst_192x192_64x4_2x1_v_bz_coopA_NNT", "ampere_sgemm_128x64_nn",
             "cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<...", "gemv2T_kernel_val",
             "cublasLt::splitKreduce_kernel<32, 16, int, float>", "sm80_xmma_gemm_f32f32_f32f32"});
  kinds(1, {"cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x128",
               "cudnn::fusion::compute_dot_do_o_specialized<true, 128>",
               "fmha_v2_flash_attention_bf16"});
  kinds(2, {"OnCuda<BF16>::rms_norm", "adamw", "memset", "copy",
               "cub::detail::radix_sort::DeviceRadixSortOnesweepKernel<"});
  kinds(3, {"ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage)", "p2p_copy"});
}

TEST(Profile, NamesForPeople) {
  // Of each_kernel<1, lambda of OnCuda<float>::softmax_grad>, and as cuBLAS names its own.
  EXPECT_EQ(
      kernel_name("_ZN4pith11each_kernelILi1E17__nv_dl_wrapper_tI11__nv_dl_tagIPFvRNS_4RankERKNS"
                  "_6TensorES7_EXadL_ZNS_10cuda_countES4_S7_S7_EELj1EEJlPKilPdEEEEvlT0_"),
      "cuda_count");
  EXPECT_EQ(kernel_name("_ZN3cub11EmptyKernelIvEEvv"), "cub::EmptyKernel<void>");
  EXPECT_EQ(kernel_name("_ZN4pith12_GLOBAL__N_19plain_oneEPKfi"), "plain_one");
  EXPECT_EQ(kernel_name("nvjet_tst_64x8"), "nvjet_tst_64x8");
  EXPECT_EQ(kernel_name("copy"), "copy");
  const string unknown = "_ZN7cutlass" + string(1000, 'x');
  EXPECT_TRUE(kernel_name(unknown).starts_with("_ZN7cutlassx"));
  EXPECT_LE(kernel_name(unknown).size(), 80u);
  const string many = "_ZN7cutlass1aILi" + string(90, '1') + "EEEvv";
  EXPECT_LE(kernel_name(many).size(), 80u);
  EXPECT_TRUE(kernel_name(many).starts_with("cutlass::a<11")) << kernel_name(many);
}

// Two streams; 100 us, of which 20 to 30 and 80 to 100 are idle.
static void fill(Profile& p) {
  p.step = 7;
  p.us = 100;
  p.stages = {{"background"}, {"attention forward", 0, 2}, {"experts weights", 11, 0}};
  p.launches = {{60, 20, 7, 2, "nvjet_b"}, {0, 10, 7, 1, "nvjet_a"}, {10, 10, 7, 1, "sdpa_flash"},
      {30, 30, 7, 1, "_ZN4pith5adamwEv"}, {50, 20, 9, 0, "copy"}, {75, 5, 9, 2, "ncclDevKernel"}};
}

TEST(Profile, SharesCountEachMomentOnce) {
  Profile p;
  fill(p);
  std::ranges::sort(p.launches, {}, &Launch::begin_us);
  const vector<double> shares = profile_shares(p);
  const vector<double> need = {20, 10, 40, 0, 30};
  ASSERT_EQ(shares.size(), need.size());
  double sum = 0;
  for (size_t i = 0; i < need.size(); i++) {
    EXPECT_NEAR(shares[i], need[i], 1e-9) << i;
    sum += shares[i];
  }
  EXPECT_NEAR(sum, 100, 1e-9);
}

TEST(Profile, TableOfTheLongest) {
  Profile p;
  p.step = 3;
  p.us = 2000;
  p.stages = {{"step"}};
  for (int i = 0; i < 24; i++)
    p.launches.push_back({i * 80.0, i % 12 + 1.0, 7, 0, text("kernel_%02d", i % 12)});
  const string table = profile_table(p);
  EXPECT_TRUE(table.starts_with("step 3: 2.000 ms, 24 launches\n")) << table;
  EXPECT_NE(table.find("     0.024   1.2%      2  kernel_11\n"), string::npos) << table;
  EXPECT_LT(table.find("kernel_11"), table.find("kernel_10"));
  EXPECT_NE(table.find("kernel_02"), string::npos) << table;
  EXPECT_EQ(table.find("kernel_01"), string::npos) << table;
  EXPECT_TRUE(
      table.ends_with("\nmatrix products 0.0%, attention 0.0%, memory-bound kernels 7.8%, "
                      "communication 0.0%, idle 92.2%"))
      << table;
}

TEST(Profile, Files) {
  const string folder = testing::TempDir() + "profile";
  std::filesystem::create_directories(folder);
  Profile p;
  fill(p);
  write_profile(folder, p);
  std::istringstream rows(read_text_file(folder + "/profile-step-000007.tsv"));
  vector<string> lines;
  for (string line; std::getline(rows, line);) lines.push_back(line);
  ASSERT_EQ(lines.size(), 7u);
  EXPECT_EQ(lines[0], "start_us\tduration_us\tstream\tstage\tlayer\tmicro_batch\tkernel");
  EXPECT_EQ(lines[1], "0.000\t10.000\t7\tattention forward\t0\t2\tnvjet_a");
  EXPECT_EQ(lines[3], "30.000\t30.000\t7\tattention forward\t0\t2\tadamw");
  EXPECT_EQ(lines[4], "50.000\t20.000\t9\tbackground\t-1\t-1\tcopy");

  const Json events = Json::parse_file(folder + "/profile-step-000007.json")["traceEvents"];
  ASSERT_EQ(events.size(), 6);
  for (i64 i = 0; i < events.size(); i++) {
    EXPECT_EQ(events[i]["ph"].as_string(), "X");
    EXPECT_LE(events[i]["ts"].as_double() + events[i]["dur"].as_double(), 100);
  }
  EXPECT_EQ(events[3]["tid"].as_string(), "stream 9");
  EXPECT_EQ(events[3]["name"].as_string(), "copy");
  EXPECT_EQ(events[5]["args"]["stage"].as_string(), "experts weights");
  EXPECT_EQ(events[5]["args"]["layer"].as_int(), 11);
  EXPECT_EQ(events[5]["args"]["micro_batch"].as_int(), 0);
}

TEST(Profile, WithoutLaunchesNothingIsWritten) {
  const string folder = testing::TempDir() + "no-profile";
  std::filesystem::create_directories(folder);
  Profile p;
  write_profile(folder, p);
  EXPECT_TRUE(std::filesystem::is_empty(folder));
}

}
