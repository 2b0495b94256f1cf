// Handing out tasks: to the threads that PyTorch keeps, or to a pool of our own.
// Enters: a count and a body. Leaves: every task run once. Floor: beside threads.h.
#include "threads.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace regard {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<GompParallel> gomp_parallel{nullptr};

struct Job {
    i64 tasks;
    i64 scratch_bytes;
    char* scratch;
    Body body;
    const void* context;
    std::atomic<i64> next{0};
    std::atomic<int> workers{0};
};

void work(void* pointer) {
    Job& job = *static_cast<Job*>(pointer);
    char* scratch = job.scratch + job.scratch_bytes * job.workers.fetch_add(1);
    for (i64 task; (task = job.next.fetch_add(1)) < job.tasks;) job.body(job.context, task, scratch);
}

// Threads that sleep between jobs. One job at a time; a caller that finds the pool busy works alone.
class Pool {
  public:
    void run(Job& job, int threads) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn.owns_lock()) return work(&job);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while (static_cast<int>(started_.size()) < threads - 1)
                started_.emplace_back([this] { loop(); }), started_.back().detach();
            job_ = &job;
            wanted_ = threads - 1;
        }
        wake_.notify_all();
        work(&job);
        std::unique_lock<std::mutex> lock(mutex_);
        wanted_ = 0;  // whoever has not begun need not
        done_.wait(lock, [this] { return running_ == 0; });
        job_ = nullptr;
    }

    void after_fork() { started_.clear(); }  // a child process has none of its parent's threads

  private:
    void loop() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [this] { return wanted_ > 0; });
            --wanted_;
            ++running_;
            Job* job = job_;
            lock.unlock();
            work(job);
            lock.lock();
            if (--running_ == 0) done_.notify_all();
        }
    }

    std::mutex turn_, mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> started_;
    Job* job_ = nullptr;
    int wanted_ = 0, running_ = 0;
};

Pool* pool() {
    static Pool* only = [] {
        pthread_atfork(nullptr, nullptr, [] { pool()->after_fork(); });
        return new Pool;  // never destroyed: its threads may outlive static destructors
    }();
    return only;
}

// One buffer for each calling thread, kept between calls.
struct Scratch {
    char* data = nullptr;
    i64 size = 0;
    ~Scratch() { std::free(data); }
    void drop() {
        std::free(data);
        data = nullptr, size = 0;
    }
    char* grow(i64 bytes) {
        if (bytes > size) {
            std::free(data);
            size = 0;
            data = static_cast<char*>(std::aligned_alloc(64, static_cast<std::size_t>(bytes)));
            if (data == nullptr) throw std::bad_alloc();
            size = bytes;
        }
        return data;
    }
};

}  // namespace

void use_openmp(u64 address) { gomp_parallel = reinterpret_cast<GompParallel>(address); }

char* kept_memory(i64 bytes) {
    constexpr i64 kWorthKeeping = 64 << 20;  // a long call's memory goes back with the next short one
    thread_local Scratch memory;
    bytes = (bytes + 63) / 64 * 64;
    if (memory.size > kWorthKeeping && bytes <= kWorthKeeping) memory.drop();
    return memory.grow(bytes);
}

void parallel(i64 tasks, int threads, i64 scratch_bytes, Body body, const void* context) {
    if (tasks <= 0) return;
    if (threads > tasks) threads = static_cast<int>(tasks);
    if (threads < 1) threads = 1;
    scratch_bytes =
        (scratch_bytes + 255) / 256 * 256 + 256;  // an odd number of lines apart: no two buffers alias at 4 KiB
    thread_local Scratch scratch;
    Job job{tasks, scratch_bytes, scratch.grow(scratch_bytes * threads), body, context};
    if (threads == 1) {
        work(&job);
    } else if (GompParallel run = gomp_parallel) {
        run(work, &job, static_cast<unsigned>(threads), 0);
    } else {
        pool()->run(job, threads);
    }
}

}  // namespace regard
