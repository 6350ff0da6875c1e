#!/bin/sh
# Compile the engine into _engine.so beside this file, as the build hook does.
cd "$(dirname "$0")" && ${CXX:-g++} -O3 -std=c++17 -shared -fPIC -pthread *.cpp -o _engine.so
