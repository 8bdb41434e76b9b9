include(GoogleTest)

# What the tests share, compiled once: the headers that every test reads, and the tools of src/ops/op_test.h.
add_library(krait_test_tools STATIC ${PROJECT_SOURCE_DIR}/src/ops/op_test.cpp ${PROJECT_SOURCE_DIR}/src/ops/deferred_engine.cpp)
target_include_directories(krait_test_tools PUBLIC ${PROJECT_SOURCE_DIR}/src ${PROJECT_SOURCE_DIR})
target_link_libraries(krait_test_tools PUBLIC krait GTest::gtest OpenMP::OpenMP_CXX hwy::hwy nlohmann_json::nlohmann_json)
target_compile_definitions(krait_test_tools PUBLIC KRAIT_SOURCE_DIR="${PROJECT_SOURCE_DIR}")
krait_compile_options(krait_test_tools)
target_compile_options(krait_test_tools PRIVATE -O1)
target_precompile_headers(krait_test_tools PRIVATE <gtest/gtest.h>)

# krait_tests(NAME source..): one GoogleTest program; each of its tests is a ctest entry of its own.
function(krait_tests name)
  add_executable(${name} ${ARGN})
  target_link_libraries(${name} PRIVATE krait_test_tools GTest::gtest_main)
  krait_compile_options(${name})
  target_compile_options(${name} PRIVATE -O1)  # half the compile time; what is tested is in the library
  target_precompile_headers(${name} REUSE_FROM krait_test_tools)
  # Tests of the CUDA engine (`ctest -L cuda`) skip where there is no GPU.
  gtest_discover_tests(${name} TEST_FILTER "-*Cuda.*" DISCOVERY_MODE PRE_TEST DISCOVERY_TIMEOUT 60 PROPERTIES TIMEOUT 600
    ENVIRONMENT OMP_WAIT_POLICY=passive)  # tests run side by side: waiting threads must not spin
  gtest_discover_tests(${name} TEST_FILTER "*Cuda.*" TEST_LIST ${name}_cuda DISCOVERY_MODE PRE_TEST DISCOVERY_TIMEOUT 60
    PROPERTIES TIMEOUT 600 LABELS cuda)
endfunction()
