// Signals during a wait on the host transport: Python only notes them, and runs their handlers when it is asked to.
//
// Contract
//   * interrupted() runs the handlers that are due, as PEP 475 wants of a long system call. True: one of them raised, as Ctrl-C's
//     does. The wait is to end; what was raised follows as soon as the interpreter is back in Python code.
//   * Handlers run in the main thread only, so any other thread is never interrupted; nor is a process without Python.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

// Of Python's stable ABI, and weak: this library links no Python.
extern "C" {
__attribute__((weak)) int PyGILState_Ensure();
__attribute__((weak)) void PyGILState_Release(int state);
__attribute__((weak)) int PyErr_CheckSignals();
__attribute__((weak)) void PyErr_Fetch(void** type, void** value, void** trace);
__attribute__((weak)) void PyErr_Restore(void* type, void* value, void* trace);
__attribute__((weak)) int Py_AddPendingCall(int (*call)(void*), void* argument);
}

namespace mnnvl_ar::host {

struct Raised {
  void* type;
  void* value;
  void* trace;
};

// An op can only throw what becomes a RuntimeError, so what a handler raised is raised anew, by the interpreter's own queue.
inline int raise_again(void* argument) {
  auto* const raised = static_cast<Raised*>(argument);
  PyErr_Restore(raised->type, raised->value, raised->trace);
  delete raised;
  return -1;
}

inline bool interrupted() {
  const bool is_python = PyGILState_Ensure != nullptr && PyGILState_Release != nullptr &&
                         PyErr_CheckSignals != nullptr && PyErr_Fetch != nullptr && PyErr_Restore != nullptr &&
                         Py_AddPendingCall != nullptr;
  if (!is_python || syscall(SYS_gettid) != getpid()) return false;
  const int state = PyGILState_Ensure();
  const bool has_raised = PyErr_CheckSignals() != 0;
  if (has_raised) {
    auto* const raised = new Raised{};
    PyErr_Fetch(&raised->type, &raised->value, &raised->trace);
    Py_AddPendingCall(raise_again, raised);
  }
  PyGILState_Release(state);
  return has_raised;
}

}  // namespace mnnvl_ar::host
