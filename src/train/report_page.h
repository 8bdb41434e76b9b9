// The parts of the report's page that do not depend on the runs.
#pragma once

namespace krait {

extern const char* const kReportStyle;   // contents of <style>
extern const char* const kReportScript;  // contents of <script>; draws window.runs

}  // namespace krait
