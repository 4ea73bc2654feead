package nri

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// awaitPlugins waits until the state has these plugins.
func awaitPlugins(t *testing.T, r *Runtime, want ...PluginState) {
	t.Helper()
	var diff string
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if diff = cmp.Diff(want, r.State().Plugins); diff == "" {
			return
		}
	}
	t.Errorf("plugins: %s", diff)
}

// TestState follows a real plugin: it connects, fails, and disconnects.
func TestState(t *testing.T) {
	r, p := connect(t, &fakeNode{})
	<-p.synced
	hold(t, r)
	if !r.State().Started {
		t.Error("the runtime has not started")
	}
	awaitPlugins(t, r, PluginState{Name: "10-test", Connections: 1})

	p.err = errors.New("not today")
	if err := r.Announce(t.Context(), RunPod, testPod(), nil); err == nil {
		t.Error("the plugin did not fail")
	}
	all := r.State().Plugins
	if len(all) != 1 || all[0].Failures != 1 || !strings.HasPrefix(all[0].LastError, "RunPodSandbox: ") ||
		!strings.Contains(all[0].LastError, "not today") {
		t.Errorf("plugins after a failure: %+v", all)
	}

	p.err = nil
	if err := r.Announce(t.Context(), RunPod, testPod(), nil); err != nil {
		t.Error(err)
	}
	awaitPlugins(t, r, PluginState{Name: "10-test", Connections: 1, Failures: 1})

	p.err = errors.New("not today") // a plugin that rejects pods and is stopped is not dropped
	if err := r.Announce(t.Context(), RunPod, testPod(), nil); err == nil {
		t.Error("the plugin did not fail")
	}
	p.stub.Stop()
	awaitPlugins(t, r)
}

// TestStateAfterTimeout keeps the reason of a dropped plugin.
func TestStateAfterTimeout(t *testing.T) {
	r, p := connect(t, &fakeNode{})
	<-p.synced
	hold(t, r)

	defer close(p.hang)
	if err := r.Announce(t.Context(), Start, testPod(), testContainer()); err != nil {
		t.Fatal(err)
	}

	awaitPlugins(t, r, PluginState{
		Name:      "10-test",
		Failures:  1,
		LastError: "StartContainer: context deadline exceeded",
		Dropped:   true,
	})
}

// TestManyPlugins bounds the table.
func TestManyPlugins(t *testing.T) {
	table := &pluginTable{plugins: map[string]*PluginState{}}
	for i := range 2 * maxPlugins {
		table.called(fmt.Sprintf("10-%d", i), "X", context.DeadlineExceeded)
	}
	if got := len(table.all()); got != maxPlugins {
		t.Errorf("%d plugins, want %d", got, maxPlugins)
	}
}

// TestPluginNames rejects an executable file without an index, and names it with the fix.
func TestPluginNames(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, mode os.FileMode) {
		if err := os.WriteFile(filepath.Join(dir, name), nil, mode); err != nil {
			t.Fatal(err)
		}
	}
	write("README", 0o600)
	write("10-good", 0o700)
	if err := checkPlugins(dir); err != nil {
		t.Errorf("valid names: %v", err)
	}

	write("logger", 0o700)
	err := checkPlugins(dir)
	if err == nil || !strings.Contains(err.Error(), "plugin logger") ||
		!strings.Contains(err.Error(), "chmod a-x "+filepath.Join(dir, "logger")) {
		t.Errorf("error %v, want one with the file and the fix", err)
	}
}
