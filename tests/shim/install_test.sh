#!/bin/sh
# usage: install_test.sh BUILD_DIR SOURCE_DIR
# The example against an installed tree: by pkg-config, by the CMake package, and with the installed `ring3 with`.
set -eu
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
cmake --install "$1" --prefix "$root/usr" > "$root/log" || { cat "$root/log"; exit 1; }
lib=$(dirname "$(find "$root/usr" -name 'libring3.so.0' | head -n 1)")
PKG_CONFIG_PATH="$lib/pkgconfig"
export PKG_CONFIG_PATH
# shellcheck disable=SC2046 # flags are words
cc -Wall -Werror "$2/examples/tiny_guest.c" $(pkg-config --cflags --libs ring3) -o "$root/by-pkg-config"
LD_LIBRARY_PATH=$lib "$root/by-pkg-config" | grep -q '^port 0x10: 42$'
mkdir "$root/project"
cp "$2/examples/tiny_guest.c" "$root/project"
cat > "$root/project/CMakeLists.txt" <<'END'
cmake_minimum_required(VERSION 3.20)
project(tiny C)
find_package(ring3 REQUIRED)
add_executable(tiny tiny_guest.c)
target_link_libraries(tiny PRIVATE ring3::ring3)
END
cmake -S "$root/project" -B "$root/project/build" -DCMAKE_PREFIX_PATH="$root/usr" > "$root/log" || { cat "$root/log"; exit 1; }
cmake --build "$root/project/build" > "$root/log" || { cat "$root/log"; exit 1; }
"$root/project/build/tiny" | grep -q '^the guest halted$'
"$root/usr/bin/ring3" with -- "$1/tests/shim/ring3_shim_program" | grep -q '^all passed$'
echo "all passed"
