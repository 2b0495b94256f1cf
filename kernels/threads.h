// Threads: tasks handed out one by one to the pool that PyTorch already runs, or to one of our own where there is none.
// Enters: a task count and a function. Leaves: every task done, in any order; results must not depend on it.
// Floor: beside view.h; compiled once, for no particular target.
#pragma once
#include "view.h"

namespace regard {

using Body = void (*)(const void* context, i64 task, void* scratch);

// Runs body(context, task, scratch) for each task in [0, tasks); each worker has `scratch_bytes` of its own, 64-byte
// aligned. Throws std::bad_alloc before any task has begun, never after.
void parallel(i64 tasks, int threads, i64 scratch_bytes, Body body, const void* context);

// Memory that all tasks of the calling thread's next jobs share, 64-byte aligned, kept between calls; the next request
// may move it. Throws std::bad_alloc.
char* kept_memory(i64 bytes);

// The address of GOMP_parallel in the OpenMP library that PyTorch has loaded: two pools on the same cores fight. 0: use
// ours.
void use_openmp(u64 address);

}  // namespace regard
