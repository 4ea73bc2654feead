package rootonly

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const nobody = 65534

// TestMain lets the test binary listen as another user.
func TestMain(m *testing.M) {
	if network, address, found := strings.Cut(os.Getenv("ROOTONLY_TEST_LISTEN"), "://"); found {
		l, err := net.Listen(network, address)
		if err != nil {
			panic(err)
		}

		if _, err := os.Stdout.WriteString(l.Addr().String() + "\n"); err != nil {
			panic(err)
		}

		_, _ = io.Copy(io.Discard, os.Stdin) // ends with the test
		os.Exit(0)
	}

	os.Exit(m.Run())
}

// listenAs starts a listening process of a user and returns its address.
func listenAs(t *testing.T, uid uint32, endpoint string) string {
	t.Helper()
	program := filepath.Join(publicDir(t), "listen")
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}

	if err := os.WriteFile(program, self, 0o755); err != nil {
		t.Fatal(err)
	}

	cmd := exec.Command(program)
	cmd.Dir, cmd.Env = "/", append(os.Environ(), "ROOTONLY_TEST_LISTEN="+endpoint)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}

	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}

	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}

	t.Cleanup(func() { in.Close(); cmd.Wait() }) //nolint:errcheck // it ends with its input
	b := make([]byte, 200)
	n, err := out.Read(b)
	if err != nil {
		t.Fatal(err)
	}

	return strings.TrimSpace(string(b[:n]))
}

// publicDir creates a directory open to other users.
func publicDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "rootonly")
	if err != nil {
		t.Fatal(err)
	}

	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}

	return dir
}

// createFiles creates files below a root. Directories end in "/", links contain "->".
func createFiles(t *testing.T, root string, entries ...string) {
	t.Helper()
	for _, e := range entries {
		name, target, isLink := strings.Cut(e, "->")
		file := filepath.Join(root, name)
		var err error
		switch {
		case isLink:
			err = os.Symlink(target, file)
		case strings.HasSuffix(e, "/"):
			err = os.MkdirAll(file, 0o755)
		default:
			err = os.WriteFile(file, []byte(e), 0o644)
		}

		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestOpen(t *testing.T) {
	root := t.TempDir()
	createFiles(t, root, "a/", "a/b/", "a/b/f", "link->/a/b/f", "rel->a/../a/b/f", "dir->a/b", "loop->loop",
		"out->../../../../a/b/f", "null->/dev/null", "up->..")
	for _, good := range []string{
		"/a/b/f", "//a/./b/f", "/a/b/../b/f", "/link", "/rel", "/dir/f", "/out", "/up/a/b/f", "/../a/b/f",
	} {
		t.Run(good, func(t *testing.T) {
			f, err := Open(root, good)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()

			if b, err := io.ReadAll(f); err != nil || string(b) != "a/b/f" {
				t.Errorf("read %q, %v", b, err)
			}
		})
	}

	if err := unix.Mkfifo(filepath.Join(root, "fifo"), 0o644); err != nil {
		t.Fatal(err)
	}

	for bad, want := range map[string]error{
		"/fifo":                         ErrNotRegular,
		"/a":                            ErrNotRegular,
		"/":                             ErrNotRegular,
		"/none":                         os.ErrNotExist,
		"/loop":                         unix.ELOOP,
		"/link/x":                       unix.ENOTDIR,
		"a/b/f":                         nil, // any error
		"":                              nil,
		"/null":                         os.ErrNotExist,
		"/a\x00":                        nil,
		"/" + strings.Repeat("x", 5000): nil,
	} {
		t.Run(fmt.Sprintf("%.20q", bad), func(t *testing.T) {
			f, err := Open(root, bad)
			if err == nil {
				f.Close()
			}
			if err == nil || want != nil && !errors.Is(err, want) {
				t.Errorf("error %v, want %v", err, want)
			}
		})
	}
}

// TestOthersCanChange makes one component of the path writable by others.
func TestOthersCanChange(t *testing.T) {
	for name, c := range map[string]struct {
		do      func(root string) error
		because string
		shared  bool
	}{
		"owner of the file":    {func(r string) error { return os.Chown(r+"/a/b/f", nobody, 0) }, "/a/b/f", false},
		"mode of the file":     {func(r string) error { return os.Chmod(r+"/a/b/f", 0o646) }, "/a/b/f", false},
		"group of the file":    {func(r string) error { return os.Chmod(r+"/a/b/f", 0o664) }, "/a/b/f", false},
		"owner of a directory": {func(r string) error { return os.Chown(r+"/a", nobody, 0) }, "/a", false},
		"mode of a directory":  {func(r string) error { return os.Chmod(r+"/a", 0o777) }, "/a", false},
		"group of a directory": {func(r string) error { return os.Chmod(r+"/a/b", 0o775) }, "/a/b", false},
		"a sticky directory":   {func(r string) error { return os.Chmod(r+"/a/b", 0o777|os.ModeSticky) }, "/a/b", true},
		"owner of a sticky one": {func(r string) error {
			return errors.Join(os.Chmod(r+"/a", 0o777|os.ModeSticky), os.Chown(r+"/a", nobody, 0))
		}, "/a", false},
		"owner of the link":      {func(r string) error { return os.Lchown(r+"/link", nobody, 0) }, "/link", false},
		"a directory after link": {func(r string) error { return os.Chmod(r+"/a/b", 0o757) }, "/a/b", false},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			createFiles(t, root, "a/", "a/b/", "a/b/f", "link->a/b/f")
			if err := c.do(root); err != nil {
				t.Fatal(err)
			}

			f, err := Open(root, "/link")
			if err == nil {
				f.Close()
			}

			var fileErr *FileError
			if !errors.As(err, &fileErr) || fileErr.File != "/link" || fileErr.Because != c.because ||
				fileErr.Shared != c.shared || !strings.HasPrefix(fileErr.Reason, c.because+": ") {
				t.Errorf("error %+v, want a FileError for %s", err, c.because)
			}
		})
	}

	root := t.TempDir() // others cannot replace root's own directory in a sticky one
	createFiles(t, root, "tmp/", "tmp/d/", "tmp/d/f")
	if err := os.Chmod(root+"/tmp", 0o777|os.ModeSticky); err != nil {
		t.Fatal(err)
	}

	f, err := Open(root, "/tmp/d/f")
	if err != nil {
		t.Fatal(err)
	}

	f.Close()
}

// TestDialTrustsRootOnly connects to listeners of root and of another user.
func TestDialTrustsRootOnly(t *testing.T) {
	open := publicDir(t)
	theirs := filepath.Join(open, "theirs")
	if err := errors.Join(os.Mkdir(theirs, 0o755), os.Chown(theirs, nobody, nobody)); err != nil {
		t.Fatal(err)
	}

	moved := filepath.Join(open, "moved.sock") // another user's socket in root's directory
	if err := os.Rename(listenAs(t, nobody, "unix://"+theirs+"/a.sock"), moved); err != nil {
		t.Fatal(err)
	}

	for name, c := range map[string]struct {
		network, address string
		want             bool
	}{
		"root's socket":                    {"unix", listenAs(t, 0, "unix://"+open+"/root.sock"), true},
		"root's socket in another's place": {"unix", listenAs(t, 0, "unix://"+theirs+"/root.sock"), false},
		"another's socket in root's place": {"unix", moved, false},
		"root's port":                      {"tcp", listenAs(t, 0, "tcp://127.0.0.1:0"), true},
		"root's port at all addresses":     {"tcp", loopback(listenAs(t, 0, "tcp://:0")), true},
		"root's port, IPv6":                {"tcp", listenAs(t, 0, "tcp://[::1]:0"), true},
		"another's port":                   {"tcp", listenAs(t, nobody, "tcp://127.0.0.1:0"), false},
		"another's port at all addresses":  {"tcp", loopback(listenAs(t, nobody, "tcp://:0")), false},
		"another's port, IPv6":             {"tcp", listenAs(t, nobody, "tcp://[::1]:0"), false},
		"another's port in 127.0.0.0/8":    {"tcp", listenAs(t, nobody, "tcp://127.9.9.9:0"), false},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()

			conn, err := Dial(ctx, c.network, c.address)
			if err == nil {
				conn.Close()
			}

			var peer *PeerError
			if (err == nil) != c.want || err != nil && !errors.As(err, &peer) {
				t.Errorf("dial %s: error %v, want success %v", c.address, err, c.want)
			}
		})
	}
}

func loopback(address string) string {
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		return err.Error()
	}
	return "127.0.0.1:" + port
}

func TestHexAddress(t *testing.T) {
	for in, want := range map[string]string{
		"0100007F:1F90": "127.0.0.1:8080", "00000000:0016": "0.0.0.0:22",
		"00000000000000000000000001000000:0050": "[::1]:80",
		"0000000000000000FFFF00000100007F:0050": "127.0.0.1:80",
	} {
		if got, err := parseHexAddress(in); err != nil || got != netip.MustParseAddrPort(want) {
			t.Errorf("%s: got %v, %v; want %s", in, got, err, want)
		}
	}

	for _, in := range []string{"", ":", "0:0", "zzzzzzzz:1", "0100007F:FFFFF", "0100007F"} {
		if got, err := parseHexAddress(in); err == nil {
			t.Errorf("%s: got %v, want an error", in, got)
		}
	}
}

func TestEngineAddress(t *testing.T) {
	t.Setenv("DOCKER_HOST", "unix:///env.sock")

	for in, want := range map[string]string{
		"unix:///a": "unix /a",
		"tcp://h:1": "tcp h:1",
		"":          "unix /env.sock",
		"npipe://x": " ",
		"gopher":    " ",
	} {
		network, address := EngineAddress(in)
		if network+" "+address != want || (EngineDial(in) == nil) != (want == " ") {
			t.Errorf("%q: got network %q, address %q; want %q", in, network, address, want)
		}
	}
}
