# A room is a folder under src/ and one static library, ring3_<room>.
#
#   ring3_room(engine/mmu DEPS memory engine/state [LIBS Zydis::Zydis] [SYSTEM_LIBS dl])
#
# Every *.cpp in the folder belongs to it, but for *_test.cpp, which become the test program
# <room>_test. A room sees the headers of the rooms it names, and of those these name, and no
# others: its include path holds one symlink per room, so that an arrow that is not declared
# here does not compile.

set(RING3_WARNINGS -Wall -Wextra -Werror -Wshadow -Wnon-virtual-dtor -Wimplicit-fallthrough
                   -Wcast-qual -Wformat=2 -Wno-missing-field-initializers)

set(RING3_SANITIZE_FLAGS "")
if(RING3_SANITIZE)
  set(RING3_SANITIZE_FLAGS -fsanitize=${RING3_SANITIZE} -fno-omit-frame-pointer)
  if(RING3_SANITIZE MATCHES "undefined")
    list(APPEND RING3_SANITIZE_FLAGS -fno-sanitize-recover=all)
  endif()
  if(RING3_SANITIZE MATCHES "thread" AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    list(APPEND RING3_SANITIZE_FLAGS -Wno-tsan)  # it says that fences are not modelled
  endif()
endif()

# Flags every target of the project gets.
function(ring3_flags target)
  target_compile_options(${target} PRIVATE ${RING3_WARNINGS} ${RING3_SANITIZE_FLAGS})
  target_link_options(${target} PRIVATE ${RING3_SANITIZE_FLAGS})
endfunction()

function(ring3_room_target room out)
  string(REPLACE "/" "_" name "${room}")
  set(${out} "ring3_${name}" PARENT_SCOPE)
endfunction()

function(ring3_room room)
  cmake_parse_arguments(ARG "" "" "DEPS;LIBS;TEST_DEPS" ${ARGN})
  ring3_room_target(${room} target)
  set(dir ${PROJECT_SOURCE_DIR}/src/${room})
  file(GLOB sources CONFIGURE_DEPENDS ${dir}/*.cpp ${dir}/*.S)
  set(tests ${sources})
  list(FILTER tests INCLUDE REGEX "_test\\.cpp$")
  list(FILTER sources EXCLUDE REGEX "_test\\.cpp$")

  # One include root per room, holding just this room.
  set(root ${PROJECT_BINARY_DIR}/rooms/${target})
  get_filename_component(parent ${root}/${room} DIRECTORY)
  file(MAKE_DIRECTORY ${parent})
  file(CREATE_LINK ${dir} ${root}/${room} SYMBOLIC)

  if(sources)
    set(scope PUBLIC)
    add_library(${target} STATIC ${sources})
    ring3_flags(${target})
  else()
    set(scope INTERFACE)
    add_library(${target} INTERFACE)
  endif()
  target_include_directories(${target} ${scope} ${root})
  foreach(dep ${ARG_DEPS})
    ring3_room_target(${dep} dep_target)
    target_link_libraries(${target} ${scope} ${dep_target})
  endforeach()
  if(ARG_LIBS)
    target_link_libraries(${target} ${scope} ${ARG_LIBS})
  endif()

  if(tests AND RING3_BUILD_TESTS)
    add_executable(${target}_test ${tests})
    ring3_flags(${target}_test)
    target_link_libraries(${target}_test PRIVATE ${target} GTest::gtest_main)
    foreach(dep ${ARG_TEST_DEPS})
      ring3_room_target(${dep} dep_target)
      target_link_libraries(${target}_test PRIVATE ${dep_target})
    endforeach()
    add_test(NAME ${target} COMMAND ${target}_test)
    set_tests_properties(${target} PROPERTIES TIMEOUT 300)
  endif()
endfunction()
