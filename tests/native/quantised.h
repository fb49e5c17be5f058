// csrc/protocol's quantised numerics as part of the tests' Python module (protocol.cpp).
#pragma once

#include <pybind11/pybind11.h>

void bind_quantised(pybind11::module_& m);
