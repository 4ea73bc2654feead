// Package thread runs functions on threads of their own. They may change what the kernel keeps for
// each thread: namespaces, root directory, credentials, control groups.
package thread

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// Run calls f on a new thread, which ends afterwards. f may change everything that a thread does
// not share. It never gets the main thread of the process: that one does not end, and /proc shows
// its credentials and namespaces as those of the process.
func Run(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)

		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			defer runtime.UnlockOSThread()
			Run(f)
			return
		}

		f() // the thread ends with its goroutine, since it stays locked
	}()
	<-done
}
