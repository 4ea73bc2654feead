package podnet

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestParseSysctl(t *testing.T) {
	for in, want := range map[string]string{
		"net.core.somaxconn": "net/core/somaxconn", "net/core/somaxconn": "net/core/somaxconn",
		"net.ipv4.conf.eth0/1.forwarding": "net/ipv4/conf/eth0.1/forwarding",
		"net/ipv4/conf/eth0.1/forwarding": "net/ipv4/conf/eth0.1/forwarding",
	} {
		t.Run(in, func(t *testing.T) {
			if s, err := parseSysctl(in, "1"); err != nil || s.path != want {
				t.Errorf("%s: %q, %v", in, s.path, err)
			}
		})
	}

	for _, bad := range []string{
		"", "net", "net.", ".net.core", "/net/core", "kernel.shmmax", "kernel/shmmax", "net/../kernel/shmmax",
		"net...kernel.shmmax", "net./..kernel", "net/./core",
		"net//core", "net..core", "netx.core", "net\x00.core", "net.core\n", "net.core x", "net/core\\x", "net.\xff",
		"../net/core", "..net.core", strings.Repeat("net.", 100) + "x",
	} {
		if s, err := parseSysctl(bad, "1"); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %q, %v", bad, s.path, err)
		}
	}

	for _, bad := range []string{"1\n", "1\x00", "\x1b", strings.Repeat("1", maxSysctlValue+1), "\xff"} {
		if _, err := parseSysctl("net.core.somaxconn", bad); !errdefs.IsInvalidArgument(err) || len(err.Error()) > 500 {
			t.Errorf("%.20q: %v", bad, err)
		}
	}
}

// TestSysctlsStayBelowNet verifies that no path leaves the kernel's tree, and that links are not
// followed.
func TestSysctlsStayBelowNet(t *testing.T) {
	dir := t.TempDir()
	outside := filepath.Join(t.TempDir(), "outside")
	if err := errors.Join(os.MkdirAll(filepath.Join(dir, "net"), 0o755), os.WriteFile(outside, []byte("x"), 0o644),
		os.Symlink(outside, filepath.Join(dir, "net/link"))); err != nil {
		t.Fatal(err)
	}

	root, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()

	for _, path := range []string{"net/link", "../outside", "net/../../outside", outside} {
		if err := (sysctl{path: path, value: "new"}).write(root); err == nil {
			t.Errorf("%s was written", path)
		}
	}

	if readFile(outside) != "x" {
		t.Error("the file outside was changed")
	}
}
