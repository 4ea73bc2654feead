// Package launcher is the program that containerd runs for each container (containerd, runtime v2:
// "start" and "delete"). It names the socket of the pod's running shim server, or starts one. It
// links the standard library alone: most starts end after one connection to a socket, and the
// initialization of containerd's packages would take longer than that. See docs/adr/0011.
package launcher

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"cri-dockerd/internal/shim/annotation"
)

// DeletedFile is a file in the bundle of a deleted container: the response to the action "delete",
// in containerd's form.
const DeletedFile = "deleted"

const (
	// server is the file name of the shim server, in the directory of the launcher.
	server = "containerd-shim-cri-dockerd-server"
	// socketDir is containerd's directory for the sockets of shims.
	socketDir = "/run/containerd/s"
	// connectTimeout bounds a connection to a running server. The kernel accepts it at once.
	connectTimeout = 5 * time.Second
	// maxSpec is the maximum size of config.json in bytes.
	maxSpec = 16 << 20
	// maxResponse is the maximum size of DeletedFile in bytes.
	maxResponse = 4096
	// maxGroup bounds the name of a group in bytes.
	maxGroup = 4096
)

// call holds the arguments from containerd.
type call struct {
	namespace string
	id        string // of the container
	address   string // of containerd's gRPC server
	debug     bool
	action    string
}

// Run runs the launcher with its arguments, without the program's name. It writes the result for
// containerd to stdout. The working directory is the bundle. All actions but "start", and "delete"
// of a deleted container, run in the server's program.
func Run(args []string, stdout io.Writer) error {
	c, err := parse(args)
	if err != nil {
		return err
	}

	if c.action == "delete" {
		if text, ok := readDeleted(DeletedFile); ok {
			_, err := stdout.Write(text)
			return err
		}
	}

	program, err := serverProgram()
	if err != nil {
		return err
	}

	if c.action != "start" {
		// The program is in the launcher's own directory, and containerd gave the arguments.
		return syscall.Exec(program, append([]string{program}, args...), os.Environ()) //#nosec G204
	}

	address, err := c.start(program)
	if err != nil {
		return err
	}

	_, err = io.WriteString(stdout, address)

	return err
}

// parse parses containerd's arguments. It ignores those of newer versions that a start does not
// need.
func parse(args []string) (call, error) {
	var c call
	f := flag.NewFlagSet("containerd-shim-cri-dockerd-v1", flag.ContinueOnError)
	f.StringVar(&c.namespace, "namespace", "", "namespace of the container")
	f.StringVar(&c.id, "id", "", "ID of the container")
	f.StringVar(&c.address, "address", "", "address of containerd")
	f.BoolVar(&c.debug, "debug", false, "debug output in the log")
	for _, name := range []string{"publish-binary", "bundle", "socket", "debug-socket"} {
		f.String(name, "", "for the server")
	}
	for _, name := range []string{"v", "version", "info"} {
		f.Bool(name, false, "for the server")
	}

	if err := f.Parse(args); err != nil {
		return c, err
	}

	c.action = f.Arg(0)
	if c.action == "start" && (c.namespace == "" || c.id == "") {
		return c, errors.New("start: -namespace and -id must be set")
	}

	return c, nil
}

// readDeleted returns the response for a container that its server has deleted. For all others the
// server's program cleans up.
func readDeleted(file string) (text []byte, ok bool) {
	f, err := os.Open(file)
	if err != nil {
		return nil, false
	}
	defer f.Close()

	text, err = io.ReadAll(io.LimitReader(f, maxResponse+1))

	return text, err == nil && len(text) > 0 && len(text) <= maxResponse
}

// serverProgram returns the path of the server's program.
func serverProgram() (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}

	program := filepath.Join(filepath.Dir(self), server)
	if _, err := os.Stat(program); err != nil {
		return "", fmt.Errorf("the program of the shim server is missing; install it beside %s: %w", self, err)
	}

	return program, nil
}

// start returns the address of the server for the container, and starts the server if there is
// none.
func (c call) start(program string) (string, error) {
	group, err := readGroup("config.json", c.id)
	if err != nil {
		return "", err
	}

	socket := c.socket(group)
	if !accepts(socket) {
		if err := c.startOnce(program, socket); err != nil {
			return "", fmt.Errorf("start the shim server of %s: %w", c.id, err)
		}
	}

	address := "unix://" + socket

	// The server of the bundle removes the socket of this file, and containerd 1.6 reads it when it
	// starts again.
	return address, os.WriteFile("address", []byte(address), 0o600)
}

// readGroup returns the group of a bundle's container, or id if it has none.
func readGroup(file, id string) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()

	var spec struct {
		Annotations map[string]string `json:"annotations"`
	}
	if err := json.NewDecoder(io.LimitReader(f, maxSpec)).Decode(&spec); err != nil {
		return "", fmt.Errorf("read %s: %w", file, err)
	}

	group := spec.Annotations[annotation.Group]
	switch {
	case group == "":
		return id, nil
	case len(group) > maxGroup:
		return "", fmt.Errorf("annotation %s has %d bytes, the maximum is %d", annotation.Group, len(group), maxGroup)
	}

	return group, nil
}

// socket returns the path of a group's socket. A hash keeps it within the limit of 108 bytes for
// the address of a Unix socket (unix(7)). Two engines on one node have different containerds.
func (c call) socket(group string) string {
	sum := sha256.Sum256([]byte(strings.Join([]string{"cri-dockerd", c.address, c.namespace, group}, "\x00")))
	return filepath.Join(socketDir, fmt.Sprintf("%x", sum))
}

// accepts reports whether a server listens on a socket.
func accepts(socket string) bool {
	conn, err := net.DialTimeout("unix", socket, connectTimeout)
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

// startOnce starts the server of a socket, unless another launcher has started it meanwhile.
func (c call) startOnce(program, socket string) error {
	if err := os.MkdirAll(socketDir, 0o711); err != nil {
		return err
	}

	lock, err := os.OpenFile(filepath.Join(socketDir, "cri-dockerd.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close() // and unlock

	if err := flock(int(lock.Fd())); err != nil {
		return fmt.Errorf("lock %s: %w", lock.Name(), err)
	}

	if accepts(socket) {
		return nil
	}

	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) { // of a killed server
		return err
	}

	return c.startServer(program, socket)
}

// flock waits for an exclusive lock. Its holders only start a process.
func flock(fd int) error {
	for {
		err := syscall.Flock(fd, syscall.LOCK_EX)
		if !errors.Is(err, syscall.EINTR) {
			return err
		}
	}
}

// startServer starts the server with the listening socket as its descriptor 3.
func (c call) startServer(program, socket string) (err error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return err
	}
	l.SetUnlinkOnClose(false)
	defer l.Close()
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(socket))
		}
	}()

	if err := os.Chmod(socket, 0o600); err != nil {
		return err
	}

	f, err := l.File()
	if err != nil {
		return err
	}
	defer f.Close()

	args := []string{"-namespace", c.namespace, "-id", c.id, "-address", c.address}
	if c.debug {
		args = append(args, "-debug")
	}

	cmd := exec.Command(program, args...) //#nosec G204 -- the program is in the launcher's own directory
	cmd.ExtraFiles = []*os.File{f}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // signals to containerd's group do not concern it
	if err := cmd.Start(); err != nil {
		return err
	}

	if err := adjustOOMScore(cmd.Process.Pid); err != nil {
		return errors.Join(err, cmd.Process.Kill(), cmd.Wait())
	}

	return nil // containerd's process adopts the server
}

// maxOOMScore is the highest oom_score_adj (proc(5)).
const maxOOMScore = 1000

// adjustOOMScore makes the kernel prefer a server to containerd when memory is short. containerd is
// the parent of the launcher.
func adjustOOMScore(pid int) error {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", os.Getppid()))
	if err != nil {
		return err
	}

	score, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return err
	}

	return os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), []byte(strconv.Itoa(min(score+1, maxOOMScore))), 0)
}
