package daemon

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestReload checks that SIGHUP reads the network configuration and the state of the engine,
// notifies systemd and logs one line.
func TestReload(t *testing.T) {
	r := run(t, "--network-plugin=cni")
	c := notifySocket(t) // a new listener, without earlier notifications
	before := r.engine.count("/containers/json")
	if code, text := r.get(t, "/readyz"); code != 503 || !strings.Contains(text, "no CNI configuration in") {
		t.Errorf("before: %d, %s", code, text)
	}

	conf := `{"cniVersion":"1.0.0","name":"first","plugins":[{"type":"does-not-exist"}]}`
	if err := os.MkdirAll(filepath.Join(r.dir, "net.d"), 0o755); err != nil {
		t.Fatal(err)
	}

	if err := os.WriteFile(filepath.Join(r.dir, "net.d/10-first.conflist"), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}

	if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}

	awaitState(t, c, "RELOADING=1")
	awaitState(t, c, "READY=1")
	if code, text := r.get(t, "/readyz"); code != 503 || !strings.Contains(text, "does-not-exist") ||
		!strings.Contains(text, "engine: ok") {
		t.Errorf("after: %d, %s", code, text)
	}

	if n := r.engine.count("/containers/json"); n <= before {
		t.Errorf("engine: got %d list requests after the reload, %d before", n, before)
	}
	if n := strings.Count(r.log.String(), `"msg":"reloaded"`); n != 1 {
		t.Errorf("got %d lines about the reload:\n%s", n, r.log)
	}
}
