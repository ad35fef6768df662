// Mean and sum of squared deviations of a set of values, as the kernels that compute batch
// statistics gather them.
#pragma once

#include "vector.cuh"

namespace effnet::cuda {

// count, mean and M2 (the sum of squared deviations from the mean) of a set of values.
struct Moments {
  double count = 0., mean = 0., m2 = 0.;

  // Chan's formula for the union of two sets.
  EFFNET_DEVICE void merge(const Moments& other) {
    if (other.count == 0.) return;
    const double total = count + other.count;
    const double share = other.count / total;
    const double delta = other.mean - mean;
    mean += delta * share;
    m2 += other.m2 + delta * delta * count * share;
    count = total;
  }
};

// Sums of deviations from one of the values, `origin`, and of their squares. In float64, nothing is
// lost to a mean that is far from zero, or to an origin some standard deviations from the mean.
struct ShiftedSums {
  float origin = 0.f;
  double sum = 0., squares = 0.;

  EFFNET_DEVICE Moments moments(double count) const {
    if (count == 0.) return {};
    const double mean = sum / count;
    return {count, origin + mean, squares - sum * mean};
  }
};

}  // namespace effnet::cuda
