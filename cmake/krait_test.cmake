# krait_tests(NAME source..): one GoogleTest program; each of its tests is a ctest entry of its own.
include(GoogleTest)
function(krait_tests name)
  add_executable(${name} ${ARGN})
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR}/src ${PROJECT_SOURCE_DIR})
  target_link_libraries(${name} PRIVATE krait GTest::gtest GTest::gtest_main OpenMP::OpenMP_CXX hwy::hwy
    nlohmann_json::nlohmann_json)
  target_compile_definitions(${name} PRIVATE KRAIT_SOURCE_DIR="${PROJECT_SOURCE_DIR}")
  krait_compile_options(${name})
  target_compile_options(${name} PRIVATE -O1)  # half the compile time; what is tested is in the library
  # Tests of the CUDA engine (`ctest -L cuda`) skip where there is no GPU.
  gtest_discover_tests(${name} TEST_FILTER "-*Cuda.*" DISCOVERY_MODE PRE_TEST DISCOVERY_TIMEOUT 60 PROPERTIES TIMEOUT 600
    ENVIRONMENT OMP_WAIT_POLICY=passive)  # tests run side by side: waiting threads must not spin
  gtest_discover_tests(${name} TEST_FILTER "*Cuda.*" TEST_LIST ${name}_cuda DISCOVERY_MODE PRE_TEST DISCOVERY_TIMEOUT 60
    PROPERTIES TIMEOUT 600 LABELS cuda)
endfunction()
