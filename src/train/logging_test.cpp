// The learning-rate schedule and what a run writes: metrics.jsonl, TensorBoard events, progress,
// report.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "train/digest.h"
#include "train/metrics.h"
#include "train/progress.h"
#include "train/report.h"
#include "train/schedule.h"
#include "train/test_folder.h"

namespace krait {
namespace {

TEST(Schedule, WarmsUpThenFollowsACosine) {
  const Schedule s{1.0, 0.1, true, 10, 110};
  EXPECT_DOUBLE_EQ(s.at(1), 0.1);
  EXPECT_DOUBLE_EQ(s.at(10), 1.0);
  EXPECT_DOUBLE_EQ(s.at(60), 0.55);
  EXPECT_DOUBLE_EQ(s.at(110), 0.1);
  EXPECT_DOUBLE_EQ(s.at(500), 0.1);
  for (int i = 11; i <= 110; ++i) EXPECT_LT(s.at(i), s.at(i - 1));
  const Schedule constant{1.0, 0.1, false, 0, 100};
  EXPECT_DOUBLE_EQ(constant.at(1), 1.0);
  EXPECT_DOUBLE_EQ(constant.at(100), 1.0);
}

TEST(Digest, IsCrc32c) {
  EXPECT_EQ(crc32c("123456789"), 0xe3069283u);
  Crc32c pieces;
  pieces.update("1234");
  pieces.update("56789");
  EXPECT_EQ(pieces.value(), 0xe3069283u);
  EXPECT_EQ(crc32c(""), 0u);
}

TEST(TensorBoard, RecordIsFramedAsTheFormatSays) {
  const std::string record = tensorboard_record("abc");
  ASSERT_EQ(record.size(), 8u + 4 + 3 + 4);
  EXPECT_EQ(record.substr(0, 8), std::string("\3\0\0\0\0\0\0\0", 8));
  EXPECT_EQ(record.substr(12, 3), "abc");
  const uint32_t crc = crc32c("abc");
  const uint32_t masked = ((crc >> 15) | (crc << 17)) + 0xa282ead8u;
  for (int i = 0; i < 4; ++i)
    EXPECT_EQ(static_cast<uint8_t>(record[15 + i]), masked >> (8 * i) & 0xff);
}

TEST(Metrics, LinesAreJsonAndLoseWhatAResumeTakesBack) {
  const TestFolder folder;
  {
    MetricsWriter writer(folder.path(), 0);
    for (int64_t step = 1; step <= 4; ++step) {
      writer.write(
          StepMetrics{step, step * 10, 1.0 / static_cast<double>(step), 1e-3, 2, 100, 0.1});
    }
    writer.write(EvalMetrics{4, 40, std::numeric_limits<double>::quiet_NaN(), 2, 3, 5, 0.2});
  }
  const auto path = folder.path() / "metrics.jsonl";
  std::ofstream(path, std::ios::app) << "{\"step\": 3, \"lo";  // as a crash leaves it
  const std::string all = read_text(path);
  EXPECT_NE(all.find("\"val_loss\":null"), std::string::npos);
  const auto first = nlohmann::json::parse(all.substr(0, all.find('\n')));
  EXPECT_EQ(first["loss"], 1.0);
  EXPECT_EQ(first["tokens"], 10);
  EXPECT_EQ(nlohmann::json::parse(to_json(StepMetrics{3, 30, 1.0 / 3}))["loss"].get<double>(),
            1.0 / 3);
  { MetricsWriter resumed(folder.path(), 2); }
  EXPECT_EQ(read_text(path), all.substr(0, all.find("{\"step\":3")));
  { MetricsWriter anew(folder.path(), 0); }
  EXPECT_EQ(read_text(path), "");
}

TEST(Metrics, AFullDiskIsAnError) {
  AppendFile full("/dev/full");
  EXPECT_EQ(message_of<Error>([&] { full.append("x"); }),
            "/dev/full: cannot write: No space left on device");
}

TEST(Progress, ShowsWhereTheRunIs) {
  const Progress p{400, 1000, 40, 0, 1.7321, 1.8011, 23456};
  EXPECT_EQ(
      progress_bar(p, 0),
      "[########------------]  40 %  step 400/1000  loss 1.732 (val 1.801)  23.5k tok/s  ETA 1:00");
  EXPECT_EQ(progress_bar(p, 30).size(), 30u);
  const Progress timed{10, 0, 30, 120, 2, 0, 500};
  EXPECT_EQ(progress_line(timed), "step 10  loss 2.000  500 tok/s  ETA 1:30");
  EXPECT_EQ(Progress{}.fraction(), 0);
  ProgressTimer timer(5);
  EXPECT_TRUE(timer.due(0, false));
  EXPECT_FALSE(timer.due(4.9, false));
  EXPECT_TRUE(timer.due(4.9, true));
  EXPECT_TRUE(timer.due(10, false));
}

TEST(Report, IsOnePageThatSurvivesOddInput) {
  const TestFolder folder;
  folder.file("a<b>&\"/config.toml",
              "[model]\nd_model = 64\n[data]\nseparator = \"</script><b>\"\n");
  folder.file("a<b>&\"/metrics.jsonl",
              "{\"step\":1,\"loss\":3.5,\"tokens\":10,\"elapsed_s\":1,\"lr\":0.1,\"grad_norm\":2,"
              "\"tokens_per_s\":10}\n"
              "{\"step\": 2, \"loss\": NaN, \"lr\": -Infinity}\n"
              "{\"step\":2,\"val_loss\":2.25,\"perplexity\":9.4877,\"bits_per_byte\":3.2460}\n"
              "[1, 2]\n{\"step\":3,\"lo");
  folder.file("empty/metrics.jsonl", "");
  folder.file("broken/config.toml", "[[[");
  const std::string html =
      report_html({folder.path() / "a<b>&\"", folder.path() / "empty", folder.path() / "broken"});
  EXPECT_NE(html.find("a&lt;b&gt;&amp;&quot;"), std::string::npos);
  EXPECT_EQ(html.find("a<b>"), std::string::npos);
  EXPECT_NE(html.find("&lt;/script&gt;"), std::string::npos);
  EXPECT_EQ(html.find("</script><b>"), std::string::npos);
  EXPECT_NE(html.find("2 unreadable line(s)"), std::string::npos);
  EXPECT_NE(html.find("\"loss\":[3.5,null]"), std::string::npos);
  EXPECT_NE(html.find("2.2500"), std::string::npos);
  EXPECT_NE(html.find("no metrics yet"), std::string::npos);
  for (const char* outside : {"src=", "href=", "@import", "fetch("})
    EXPECT_EQ(html.find(outside), std::string::npos);
}

TEST(Report, LongRunsAreThinned) {
  const TestFolder folder;
  std::string lines;
  for (int step = 1; step <= 50001; ++step) {
    lines += to_json(StepMetrics{step, step * 10, 2.0, 1e-3, 1, 1000, step * 0.1});
  }
  folder.file("run/metrics.jsonl", lines);
  const std::string html = report_html({folder.path() / "run"});
  EXPECT_LT(html.size(), 400000u);
  EXPECT_NE(html.find(",50001.0]"), std::string::npos);  // the last point is there
  EXPECT_NE(html.find("50,001"), std::string::npos);
}

TEST(Report, AFolderThatIsNoRunIsAnError) {
  const TestFolder folder;
  EXPECT_NE(message_of<Error>([&] { report_html({folder.path()}); }).find("not a run"),
            std::string::npos);
  EXPECT_NE(message_of<Error>([&] { report_html({folder.path() / "x"}); }).find("no such run"),
            std::string::npos);
}

}  // namespace
}  // namespace krait
