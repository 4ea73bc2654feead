package engines

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
)

// tags are the build tags of the packages, as in the Makefile.
const tags = "grpcnotrace nri_no_wasm"

// builds caches each built program for the test process.
var builds sync.Map

// Race reports whether the tests, and therefore the daemon, run with the race detector.
func Race() bool { return race }

// Build builds one of our programs at the path out, like the packages. The program is static. If
// detect is set and the tests run with the race detector, the program does too.
func Build(tb TB, out, pkg, ldflags string, detect bool) {
	tb.Helper()
	once, _ := builds.LoadOrStore(fmt.Sprint(pkg, ldflags, detect), sync.OnceValues(func() ([]byte, error) {
		tmp, err := os.MkdirTemp("", "cri-build-")
		if err != nil {
			return nil, err
		}
		defer os.RemoveAll(tmp)

		bin := filepath.Join(tmp, "program")
		args := []string{"build", "-trimpath", "-tags", tags, "-o", bin, "-ldflags"}
		cmd := exec.Command("go", append(args, "-s -w "+ldflags, pkg)...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if race && detect {
			cmd = exec.Command("go", append(args, ldflags, "-race", pkg)...)
		}
		if msg, err := cmd.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("%w\n%s", err, msg)
		}

		return os.ReadFile(bin)
	}))

	b, err := once.(func() ([]byte, error))()
	if err == nil {
		err = install(out, b)
	}

	if err != nil {
		tb.Fatalf("build %s: %v", pkg, err)
	}
}

// WriteProgram writes a script or a program to execute from this path.
func WriteProgram(tb TB, file, content string) {
	tb.Helper()
	if err := install(file, []byte(content)); err != nil {
		tb.Fatalf("write a program: %v", err)
	}
}

// install writes a program in small pieces, like package managers. Kernels from 6.18 on map a file
// written at once in equally large pieces, and these would count as the process's memory. No child
// may be forked meanwhile: it would hold the file open for writing until its own execve, and the
// kernel would refuse to execute the file (ETXTBSY).
func install(file string, program []byte) error {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()

	f, err := os.OpenFile(file, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}

	for piece := range slices.Chunk(program, 32<<10) {
		if _, err := f.Write(piece); err != nil {
			return errors.Join(err, f.Close())
		}
	}

	return f.Close()
}
