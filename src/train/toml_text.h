// TOML as run_config.cpp and experiment_settings.cpp read and write it.
#pragma once

#include <toml++/toml.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace krait {

// A value as it stands behind "key = ". Numbers as short as they are read back exactly.
std::string toml_text(bool x);
std::string toml_text(int64_t x);
std::string toml_text(double x);
std::string toml_text(std::string_view x);
std::string toml_text(const char*) = delete;  // would be a bool
std::string toml_text(const std::vector<std::string>& list);
std::string toml_text(const std::vector<int64_t>& list);

// source: the file's name, for errors. Throws Error, with the line.
toml::table parse_toml(std::string_view text, const std::string& source);

}  // namespace krait
