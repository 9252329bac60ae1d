// A thread block on one CPU thread: every CUDA thread is a fibre that runs until it waits.
//
// A fibre waits at a barrier or a shuffle. When nobody can run any more, each warp whose lanes are
// all at a shuffle exchanges its values, and when every thread that has not returned is at the
// barrier, all go on. The order of the fibres is the caller's: a race between two barriers gives
// different results forwards and backwards, and a barrier that not all threads reach is an error
// instead of a hang. Shared memory is a heap block of just the kernel's size, filled with NaNs
// before each block, so the address sanitizer sees what leaves it. Blocks run one after the other,
// kernels one at a time; nothing here is fast.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace fedms::host {

struct Schedule {
    bool reverse = false;
};

inline Schedule& schedule() {
    static Schedule the;
    return the;
}

class Block {
  public:
    static Block*& current() {
        static Block* the = nullptr;
        return the;
    }

    explicit Block(int threads) : fibres_(threads) {
        for (int i = 0; i < threads; ++i) fibres_[i].stack.reset(new char[kStack]);
    }

    void run(std::function<void()> body) {
        body_ = std::move(body);
        shared_.reset();
        for (Fibre& fibre : fibres_) prepare(fibre);
        int left = int(fibres_.size());
        while (left > 0) {
            const int count = int(fibres_.size());
            for (int i = 0; i < count; ++i) {
                const int thread = schedule().reverse ? count - 1 - i : i;
                if (fibres_[thread].state == State::ready) resume(thread);
            }
            left = release();
        }
    }

    // Wait for the block; true when any thread's vote is.
    bool barrier(bool vote) {
        Fibre& fibre = fibres_[running_];
        fibre.vote = vote;
        wait(State::barrier);
        return fibre.vote;
    }

    float shuffle(float value, int lane_bits) {
        Fibre& fibre = fibres_[running_];
        fibre.value = value;
        fibre.lane_bits = lane_bits;
        wait(State::shuffle);
        return fibre.value;
    }

    void* shared(std::size_t bytes) {
        if (!shared_) {
            shared_.reset(static_cast<char*>(::operator new(bytes, std::align_val_t(16))));
            std::memset(shared_.get(), 0xFF, bytes);
        }
        return shared_.get();
    }

  private:
    static constexpr std::size_t kStack = 128 * 1024;
    static constexpr int kWarp = 32;
    enum class State { ready, barrier, shuffle, done };

    struct Fibre {
        std::unique_ptr<char[]> stack;
        ucontext_t context;
        jmp_buf jump;
        bool begun;
        void* fake_stack;
        State state;
        bool vote;
        float value;
        int lane_bits;
    };
    struct Release {
        void operator()(char* memory) const { ::operator delete(memory, std::align_val_t(16)); }
    };

    void prepare(Fibre& fibre) {
        fibre.state = State::ready;
        fibre.begun = false;
        fibre.fake_stack = nullptr;
        getcontext(&fibre.context);
        fibre.context.uc_stack.ss_sp = fibre.stack.get();
        fibre.context.uc_stack.ss_size = kStack;
        fibre.context.uc_link = nullptr;
        makecontext(&fibre.context, &Block::enter, 0);
    }

    static void enter() {
        Block& block = *current();
        block.arrived(nullptr);
        block.body_();
        block.wait(State::done);
    }

    // Contexts begin a fibre; after that it is left and entered by jumps, as swapcontext makes a
    // system call each time. The address sanitizer has to be told of every switch, and of jumps
    // between stacks it makes nothing.
    void resume(int thread) {
        running_ = thread;
        threadIdx = dim3(unsigned(thread), 0, 0);
        Fibre& fibre = fibres_[thread];
#if defined(__SANITIZE_ADDRESS__)
        void* fake = nullptr;
        __sanitizer_start_switch_fiber(&fake, fibre.stack.get(), kStack);
        swapcontext(&main_, &fibre.context);
        __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
        if (_setjmp(main_jump_) != 0) return;
        if (fibre.begun) _longjmp(fibre.jump, 1);
        fibre.begun = true;
        setcontext(&fibre.context);
#endif
    }

    void wait(State state) {
        Fibre& fibre = fibres_[running_];
        fibre.state = state;
#if defined(__SANITIZE_ADDRESS__)
        const bool last = state == State::done;
        __sanitizer_start_switch_fiber(last ? nullptr : &fibre.fake_stack, main_stack_, main_size_);
        swapcontext(&fibre.context, &main_);
        arrived(fibre.fake_stack);
#else
        if (_setjmp(fibre.jump) == 0) _longjmp(main_jump_, 1);
#endif
    }

    // First thing on a fibre's stack after every switch to it.
    void arrived([[maybe_unused]] void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(fake_stack, &main_stack_, &main_size_);
#endif
    }

    // Everyone waits or is done: let go whom the rules let go. Returns how many are not done.
    int release() {
        const int count = int(fibres_.size());
        int left = 0, at_barrier = 0, freed = 0;
        bool any = false;
        for (int first = 0; first < count; first += kWarp) {
            int shuffling = 0;
            for (int i = first; i < first + kWarp; ++i) {
                left += fibres_[i].state != State::done;
                at_barrier += fibres_[i].state == State::barrier;
                any |= fibres_[i].state == State::barrier && fibres_[i].vote;
                shuffling += fibres_[i].state == State::shuffle;
            }
            if (shuffling < kWarp) continue;
            float values[kWarp];
            for (int i = 0; i < kWarp; ++i) values[i] = fibres_[first + i].value;
            for (int i = 0; i < kWarp; ++i) {
                Fibre& fibre = fibres_[first + i];
                fibre.value = values[i ^ fibre.lane_bits];
                fibre.state = State::ready;
            }
            ++freed;
        }
        if (left > 0 && at_barrier == left) {
            for (Fibre& fibre : fibres_) {
                if (fibre.state != State::barrier) continue;
                fibre.vote = any;
                fibre.state = State::ready;
            }
            ++freed;
        }
        if (left > 0 && freed == 0) {
            throw std::runtime_error("deadlock: of " + std::to_string(left) + " threads " +
                                     std::to_string(at_barrier) +
                                     " are at a barrier, the rest at a shuffle of half a warp");
        }
        return left;
    }

    std::vector<Fibre> fibres_;
    std::function<void()> body_;
    std::unique_ptr<char, Release> shared_;
    ucontext_t main_;
    jmp_buf main_jump_;
    int running_ = 0;
    const void* main_stack_ = nullptr;
    std::size_t main_size_ = 0;
};

// The grid's blocks in order; threads must be a multiple of a warp. There are no streams.
template <class Call>
void run(void (*kernel)(Call), dim3 grid, int threads, cudaStream_t, const Call& call) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    Block block(threads);
    Block::current() = &block;
    gridDim = grid;
    blockDim = dim3(unsigned(threads));
    for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
            blockIdx = dim3(x, y, 0);
            block.run([&] { kernel(call); });
        }
    }
}

}  // namespace fedms::host

#define FEDMS_SHARED(Type, name) \
    Type& name = *static_cast<Type*>(fedms::host::Block::current()->shared(sizeof(Type)))

inline void __syncthreads() {
    fedms::host::Block::current()->barrier(false);
}
inline int __syncthreads_or(int vote) {
    return fedms::host::Block::current()->barrier(vote != 0);
}
inline float __shfl_xor_sync(unsigned, float value, int lane_bits) {
    return fedms::host::Block::current()->shuffle(value, lane_bits);
}
