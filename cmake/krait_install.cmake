# `cmake --install`: headers, library, program, and what find_package(krait) needs.
include(CMakePackageConfigHelpers)
install(TARGETS krait EXPORT krait_targets LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/krait DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT krait_targets NAMESPACE krait:: DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/krait FILE kraitConfig.cmake)
write_basic_package_version_file(${PROJECT_BINARY_DIR}/kraitConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/kraitConfigVersion.cmake DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/krait)
