// How the threads of a parallel region divide its work.

#pragma once

#include "vectors.h"

#include <atomic>
#include <vector>

namespace {

// A part of some items.
struct Share {
    int begin, end;
};
// A thread's part of n items, in multiples of `unit`.
inline Share share_of(long id, int n, int unit) {
    long all = omp_get_num_threads(), units = (n + unit - 1) / unit;
    return {int(units * id / all * unit), std::min(n, int(units * (id + 1) / all * unit))};
}
inline Share share(int n, int unit = 1) { return share_of(omp_get_thread_num(), n, unit); }

// How many items of each thread's share have been taken: of the work at hand, of the one before, and
// of the next, between each two of which there is a barrier.
class Taken {
    struct alignas(64) Counter {
        std::atomic<int> n{0};
    };
    std::vector<Counter> counters;
    friend class Pieces;

public:
    explicit Taken(int threads) : counters(3 * size_t(threads)) {}
};

// A thread's view of it. Threads take pieces of their own shares, as memory close to a processor likes
// it, and then what others have left: not all cores are as fast, or undisturbed.
class Pieces {
    Taken &taken;
    int round = 0;

    std::atomic<int> &counter(int which, int id) {
        return taken.counters[size_t(which % 3) * omp_get_num_threads() + id].n;
    }

public:
    explicit Pieces(Taken &taken) : taken(taken) {}

    // Calls f with each Share of n items that this thread takes: each time half of what is left of a
    // thread's, but at least `least`, since memory is read fastest in one go, and at most `most`.
    template <class F> void each(int n, int least, int most, F f) {
        const int id = omp_get_thread_num(), all = omp_get_num_threads();
        counter(round + 1, id) = 0;
        for (int i = 0; i < all; i++) {
            const int whose = (id + i) % all;
            const Share part = share_of(whose, n, BLOCK);
            std::atomic<int> &taken = counter(round, whose);
            for (int begin = taken.load(), size; part.begin + begin < part.end;) {
                size = (part.end - part.begin - begin) / 2 / BLOCK * BLOCK;
                size = std::max(least, std::min(most, size));
                if (!taken.compare_exchange_weak(begin, begin + size)) continue;
                f(Share{part.begin + begin, std::min(part.end, part.begin + begin + size)});
                begin = taken;
            }
        }
        round++;
    }
};

}  // namespace
