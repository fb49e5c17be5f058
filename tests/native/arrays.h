// NumPy arrays as the bindings take and give them: contiguous, converted where they are of another dtype.
#pragma once

#include <pybind11/numpy.h>

#include <cstdint>

template <class T>
using Array = pybind11::array_t<T, pybind11::array::c_style | pybind11::array::forcecast>;
using Words = Array<uint32_t>;
using Halves = Array<uint16_t>;
