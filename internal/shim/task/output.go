package task

import (
	"fmt"
	"os"
	"sync"

	api "github.com/containerd/containerd/api/runtime/task/v3"
	"golang.org/x/sys/unix"

	"cri-dockerd/internal/shim/annotation"
)

// outputs holds the files of execs whose output goes to the daemon directly, by the IDs of their
// containers and their own.
type outputs struct {
	mu    sync.Mutex
	files map[[2]string][]*os.File
}

// redirect lets runc's service copy the output of an exec into the daemon's FIFOs in dir. It keeps
// the engine's FIFOs open until release: the engine sees the end of the output at the exit of the
// command, as without a redirection. redirect changes nothing if a FIFO is missing: the daemon has
// cancelled the exec.
func (o *outputs) redirect(r *api.ExecProcessRequest, dir, token string) error {
	if r.Terminal || r.Stdout == "" || r.Stderr == "" {
		return nil
	}

	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("directory of the daemon: %w", err)
	}
	defer root.Close()

	var files []*os.File
	paths := [2]string{}
	for i, name := range annotation.OutputFiles(token) {
		f, err := openFIFO(root.OpenFile, name)
		if err != nil {
			closeAll(files)
			return err
		}
		files = append(files, f)
		paths[i] = fmt.Sprintf("/proc/self/fd/%d", f.Fd())
	}

	for _, name := range []string{r.Stdout, r.Stderr} {
		f, err := openFIFO(os.OpenFile, name)
		if err != nil {
			closeAll(files)
			return err
		}
		files = append(files, f)
	}

	o.mu.Lock()
	defer o.mu.Unlock()

	r.Stdout, r.Stderr = paths[0], paths[1]
	if o.files == nil {
		o.files = map[[2]string][]*os.File{}
	}
	o.files[[2]string{r.ID, r.ExecID}] = files

	return nil
}

// openFIFO opens a FIFO. It opens both ends, so that no open of one end blocks (fifo(7)).
func openFIFO(open func(string, int, os.FileMode) (*os.File, error), name string) (*os.File, error) {
	f, err := open(name, os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}

	info, err := f.Stat()
	if err == nil && info.Mode().Type() != os.ModeNamedPipe {
		err = fmt.Errorf("%s is no FIFO", name)
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}

	return f, nil
}

// release ends the output of an exec, apart from what runc's service has not copied yet. It does
// nothing for other execs.
func (o *outputs) release(container, exec string) {
	o.mu.Lock()
	files := o.files[[2]string{container, exec}]
	delete(o.files, [2]string{container, exec})
	o.mu.Unlock()

	closeAll(files)
}

// releaseAll releases the outputs of a container's execs that were never started.
func (o *outputs) releaseAll(container string) {
	o.mu.Lock()
	var all []*os.File
	for key, files := range o.files {
		if key[0] == container {
			all = append(all, files...)
			delete(o.files, key)
		}
	}
	o.mu.Unlock()

	closeAll(all)
}

// closeAll closes FIFOs. Nothing was written to them here, so there is no error.
func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}
