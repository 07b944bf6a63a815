// Functions that run on stacks of their own, in turn, on one thread of the CPU.
#pragma once

#include <cstddef>

namespace cuda_on_cpu {

class Fiber {
 public:
  // To run `entry`, which must end in leave_forever, from its beginning. abandoned: the fiber was
  // left in the middle of something that it will never finish.
  void prepare(void (*entry)(), bool abandoned);

  // Runs the fiber until it leaves.
  void enter();

  // From within: back to where the fiber was entered.
  void leave();
  [[noreturn]] void leave_forever();

 private:
  static void begin();

  void (*entry_)() = nullptr;
  void* stack_pointer_ = nullptr;
  void* fake_stack_ = nullptr;      // AddressSanitizer's
  unsigned char* stack_ = nullptr;  // its lowest usable byte
};

}  // namespace cuda_on_cpu
