package podnet

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// fake is a plugin with failpoints. The file "mode" selects its behaviour, and "calls" records
// every command. ADD creates a file in "held" as a reservation, and DEL removes it.
type fake struct {
	t   *testing.T
	dir string
}

func newFake(t *testing.T) fake {
	t.Helper()
	f := fake{t, t.TempDir()}
	script := strings.ReplaceAll(`#!/bin/sh
cat > DIR/stdin.$CNI_COMMAND
echo "$CNI_COMMAND $CNI_CONTAINERID $CNI_IFNAME $CNI_NETNS $CNI_ARGS" >> DIR/calls
mode=$(cat DIR/mode)
version=$(sed -n 's/.*"cniVersion":"\([0-9.]*\)".*/\1/p' DIR/stdin.$CNI_COMMAND)
case "$CNI_COMMAND" in
ADD) touch DIR/held/$CNI_CONTAINERID;;
DEL) [ "$mode" = DEL-error ] || rm -f DIR/held/$CNI_CONTAINERID;;
esac
case "$mode" in
$CNI_COMMAND-error) echo '{"cniVersion":"1.0.0","code":7,"msg":"no address left","details":"in the range"}'; exit 1;;
$CNI_COMMAND-junk) echo 'this is not JSON'; exit 0;;
$CNI_COMMAND-stderr) echo 'the disk is full' >&2; exit 3;;
$CNI_COMMAND-silent) exit 4;;
$CNI_COMMAND-daemon) sleep 1000 & echo $! > DIR/child;;
$CNI_COMMAND-hang) sleep 1000 & echo $! > DIR/child; wait;;
$CNI_COMMAND-slow) while [ -e DIR/slow ]; do sleep 0.01; done;;
$CNI_COMMAND-none) echo '{"cniVersion":"1.0.0"}'; exit 0;;
$CNI_COMMAND-version) echo '{"cniVersion":"9.9.9","ips":[{"address":"10.1.2.3/24"}]}'; exit 0;;
esac
case "$CNI_COMMAND $version" in
"ADD 0."*) echo "{\"cniVersion\":\"$version\",\"ips\":[{\"version\":\"4\",\"address\":\"10.1.2.3/24\"}]}";;
"ADD "*) echo "{\"cniVersion\":\"$version\",\"ips\":[{\"address\":\"10.1.2.3/24\"}]}";;
"VERSION "*) echo '{"cniVersion":"1.1.0","supportedVersions":["0.3.1","0.4.0","1.0.0","1.1.0"]}';;
esac
`, "DIR", f.dir)
	if err := errors.Join(os.Mkdir(filepath.Join(f.dir, "held"), 0o755), os.WriteFile(filepath.Join(f.dir, "fake"),
		[]byte(script), 0o755)); err != nil {
		t.Fatal(err)
	}

	f.mode("")

	return f
}

// mode selects the plugin's behaviour: "<COMMAND>-<failure>", or "" for success. It clears the
// recorded calls.
func (f fake) mode(m string) {
	f.t.Helper()
	if err := os.WriteFile(filepath.Join(f.dir, "mode"), []byte(m), 0o644); err != nil {
		f.t.Fatal(err)
	}
	_ = os.Remove(filepath.Join(f.dir, "calls"))
}

// read returns the content of one of the plugin's files, "" if it does not exist.
func (f fake) read(name string) string {
	b, _ := os.ReadFile(filepath.Join(f.dir, name))
	return string(b)
}

func (f fake) calls() string { return f.read("calls") }

// held returns the pods with a reservation of the plugin.
func (f fake) held() []string {
	entries, err := os.ReadDir(filepath.Join(f.dir, "held"))
	if err != nil {
		f.t.Fatal(err)
	}

	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}

	return out
}

// network returns a CNI network with this plugin and a version of the specification.
func (f fake) network(t *testing.T, version string) *CNI {
	t.Helper()
	conf := t.TempDir()
	writeConf(t, filepath.Join(conf, "10.conflist"), "net", version)
	return newCNI(t, conf, f.dir, t.TempDir())
}

func writeConf(t *testing.T, file, name, version string) {
	t.Helper()
	conf := fmt.Sprintf(`{"cniVersion":%q,"name":%q,"plugins":[{"type":"fake","capabilities":{"portMappings":true,`+
		`"bandwidth":true,"dns":true,"ipRanges":true,"io.kubernetes.cri.pod-annotations":true,"cgroupPath":true}}]}`,
		version, name)
	if err := os.WriteFile(file, []byte(conf), 0o644); err != nil {
		t.Fatal(err)
	}
}

// newCNI returns a network following its configuration until the test ends.
func newCNI(t *testing.T, conf, bin, cache string) *CNI {
	t.Helper()
	c, err := NewCNI(CNIConfig{ConfDir: conf, BinDirs: []string{bin}, CacheDir: cache, Log: discard})
	if err != nil {
		t.Fatal(err)
	}

	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { c.Run(ctx) })
	t.Cleanup(func() { cancel(); running.Wait(); c.Close() })

	return c
}

// add connects and confirms a pod.
func add(t *testing.T, c *CNI, p Pod) {
	t.Helper()
	if _, err := c.Add(t.Context(), p); err != nil || c.IPs(p.ID) != nil {
		t.Fatalf("%v; addresses before Confirm: %v", err, c.IPs(p.ID))
	}
	if err := c.Confirm(p.ID); err != nil || c.IPs(p.ID) == nil {
		t.Fatalf("%v; addresses: %v", err, c.IPs(p.ID))
	}
}

func TestPluginFailures(t *testing.T) {
	f := newFake(t)
	c := f.network(t, "1.0.0")
	p, _ := newPod(t, sandboxID)
	for mode, want := range map[string]string{
		"ADD-error": "CNI error 7: no address left; in the range",
		"ADD-junk":  "output is not JSON: this is not JSON", "ADD-none": "assigned no address",
		"ADD-stderr": "exit status 3; standard error: the disk is full",
		"ADD-silent": "exit status 4; no output", "ADD-version": "9.9.9",
	} {
		t.Run(mode, func(t *testing.T) {
			f.mode(mode)
			_, err := c.Add(t.Context(), p)
			if err == nil || !strings.Contains(err.Error(), want) ||
				!strings.Contains(err.Error(), "connect pod default/web to network net") {
				t.Errorf("%v, want %q", err, want)
			}

			if c.IPs(p.ID) != nil || len(c.Attached()) != 1 {
				t.Errorf("addresses %v, attached %v", c.IPs(p.ID), c.Attached())
			}
			if err := c.Del(t.Context(), p); err != nil || len(f.held()) > 0 || len(c.Attached()) > 0 {
				t.Errorf("not released: %v; calls:\n%s", err, f.calls())
			}
		})
	}

	f.mode("DEL-error")
	add(t, c, p)
	if err := c.Del(t.Context(), p); err == nil ||
		!strings.Contains(err.Error(), `disconnect pod default/web from network net: plugin type="fake" failed `+
			`(delete): CNI error 7: no address left`) || c.IPs(p.ID) == nil {
		t.Errorf("a failing DEL: %v, IPs %v", err, c.IPs(p.ID))
	}

	f.mode("")
	if err := c.Del(t.Context(), p); err != nil {
		t.Error(err)
	}

	f.mode("")
	// possibly the leftover of an older shim's interrupted ADD
	if err := c.Del(t.Context(), p); err != nil || !strings.Contains(f.calls(), "DEL") {
		t.Errorf("Del of an uncached pod with a namespace: %v; calls %q", err, f.calls())
	}
}

// TestPluginHangs kills a hanging plugin and its children. The error contains the timeout.
func TestPluginHangs(t *testing.T) {
	f := newFake(t)
	c := f.network(t, "1.0.0")
	c.attach.timeout = 2 * time.Second // long enough for DEL on a busy machine
	p, _ := newPod(t, sandboxID)
	f.mode("ADD-hang")
	_, err := c.Add(t.Context(), p)
	if err == nil || !strings.Contains(err.Error(), `type="fake"`) ||
		!strings.Contains(err.Error(), "killed after a timeout of 2s") {
		t.Errorf("%v", err)
	}

	if child := strings.TrimSpace(f.read("child")); child == "" || !within(func() bool { return !alive(child) }) {
		t.Errorf("the plugin's child %s is still running", child)
	}

	del(t, c, p)
	if len(f.held()) > 0 || len(c.Attached()) > 0 {
		t.Errorf("not released; calls:\n%s", f.calls())
	}

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Add(ctx, p); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled call: %v", err)
	}

	del(t, c, p)
}

// TestPluginLeavesADaemon runs a plugin with a background process holding its output open.
func TestPluginLeavesADaemon(t *testing.T) {
	f := newFake(t)
	c := f.network(t, "1.0.0")
	p, _ := newPod(t, sandboxID)
	f.mode("ADD-daemon")
	add(t, c, p)
	child, err := strconv.Atoi(strings.TrimSpace(f.read("child")))
	if err != nil || !alive(strconv.Itoa(child)) {
		t.Errorf("%d, %v", child, err)
	}

	_ = syscall.Kill(child, syscall.SIGKILL)
}

// alive reports whether a process exists and is not a zombie.
func alive(pid string) bool {
	b, err := os.ReadFile("/proc/" + pid + "/stat")
	return err == nil && !strings.Contains(string(b), ") Z ")
}

func within(cond func() bool) bool {
	deadline := time.Now().Add(5 * time.Second)
	for tick := time.NewTicker(time.Millisecond); !cond(); <-tick.C {
		if time.Now().After(deadline) {
			return false
		}
	}
	return true
}

// TestAddCutOff kills the daemon during an ADD. The next daemon waits for the running plugin and
// then releases its reservation, with the configuration of the ADD.
func TestAddCutOff(t *testing.T) {
	f := newFake(t)
	conf, cache := t.TempDir(), t.TempDir()
	file := filepath.Join(conf, "10.conflist")
	writeConf(t, file, "net", "1.0.0")
	killed := newCNI(t, conf, f.dir, cache)
	p, _ := newPod(t, sandboxID)
	if err := os.WriteFile(filepath.Join(f.dir, "slow"), nil, 0o644); err != nil {
		t.Fatal(err)
	}

	f.mode("ADD-slow")
	list, _, err := killed.config()
	if err != nil {
		t.Fatal(err)
	}

	rt, err := runtimeConf(list, p, nil)
	if err != nil {
		t.Fatal(err)
	}

	held, err := killed.attach.journal.begin(list, rt, unconfirmed)
	if err != nil {
		t.Fatal(err)
	}

	plugin := exec.Command(filepath.Join(f.dir, "fake")) // like an interrupted AddNetworkList
	plugin.Env = append(os.Environ(),
		"CNI_COMMAND=ADD", "CNI_CONTAINERID="+p.ID, "CNI_IFNAME=eth0", "CNI_NETNS="+p.NetNS)
	plugin.Stdin, plugin.ExtraFiles = strings.NewReader(`{"cniVersion":"1.0.0"}`), []*os.File{held}
	if err := plugin.Start(); err != nil {
		t.Fatal(err)
	}
	defer plugin.Wait() //nolint:errcheck // its end is seen below

	if !within(func() bool { return len(f.held()) == 1 }) {
		t.Fatal("the plugin was not called")
	}

	held.Close() // like the end of the process
	writeConf(t, file, "another", "1.0.0")
	next := newCNI(t, conf, f.dir, cache)
	if got := next.Attached(); len(got) != 1 || got[0] != p.ID {
		t.Fatalf("attached: %v", got)
	}

	done := make(chan error, 1)
	go func() { done <- next.Del(t.Context(), Pod{ID: p.ID}) }()
	select {
	case err := <-done:
		t.Errorf("the DEL did not wait for the plugin: %v", err)
	case <-time.After(100 * time.Millisecond):
	}

	if err := os.Remove(filepath.Join(f.dir, "slow")); err != nil {
		t.Fatal(err)
	}

	if err := <-done; err != nil {
		t.Error(err)
	}

	if len(f.held()) > 0 || len(next.Attached()) > 0 || !strings.Contains(f.read("stdin.DEL"), `"name":"net"`) {
		t.Errorf("held %v, attached %v, stdin of DEL: %s", f.held(), next.Attached(), f.read("stdin.DEL"))
	}
	if remaining, _ := filepath.Glob(filepath.Join(cache, "*/*")); len(remaining) > 0 {
		t.Errorf("files remain: %v", remaining)
	}
}

// TestDelCutOff kills the daemon during a DEL. The next daemon waits for the running plugin and
// then releases the remaining resources.
func TestDelCutOff(t *testing.T) {
	f := newFake(t)
	conf, cache := t.TempDir(), t.TempDir()
	writeConf(t, filepath.Join(conf, "10.conflist"), "net", "1.0.0")
	killed := newCNI(t, conf, f.dir, cache)
	p, _ := newPod(t, sandboxID)
	add(t, killed, p)
	attachments, err := killed.attach.findAttachments(t.Context(), p)
	if err != nil || len(attachments) != 1 {
		t.Fatalf("%v, %v", attachments, err)
	}

	held, err := killed.attach.journal.begin(attachments[0].list, attachments[0].rt, unconfirmed)
	if err != nil {
		t.Fatal(err)
	}

	if err := os.WriteFile(filepath.Join(f.dir, "slow"), nil, 0o644); err != nil {
		t.Fatal(err)
	}

	f.mode("DEL-slow")
	plugin := exec.Command(filepath.Join(f.dir, "fake")) // like an interrupted DelNetworkList
	plugin.Env = append(os.Environ(), "CNI_COMMAND=DEL", "CNI_CONTAINERID="+p.ID, "CNI_IFNAME=eth0")
	plugin.Stdin, plugin.ExtraFiles = strings.NewReader(`{"cniVersion":"1.0.0"}`), []*os.File{held}
	if err := plugin.Start(); err != nil {
		t.Fatal(err)
	}
	defer plugin.Wait() //nolint:errcheck // its end is seen below

	if !within(func() bool { return len(f.held()) == 0 }) {
		t.Fatal("the plugin was not called")
	}

	held.Close() // like the end of the process

	next := newCNI(t, conf, f.dir, cache)
	if got := next.Attached(); len(got) != 1 || next.IPs(p.ID) != nil {
		t.Fatalf("attached %v, addresses %v", got, next.IPs(p.ID))
	}

	done := make(chan error, 1)
	go func() { done <- next.Del(t.Context(), p) }()
	select {
	case err := <-done:
		t.Errorf("the DEL did not wait for the plugin: %v", err)
	case <-time.After(100 * time.Millisecond):
	}

	if err := os.Remove(filepath.Join(f.dir, "slow")); err != nil {
		t.Fatal(err)
	}

	if err := <-done; err != nil || len(next.Attached()) > 0 {
		t.Errorf("%v, attached %v", err, next.Attached())
	}

	if remaining, _ := filepath.Glob(filepath.Join(cache, "*/*")); len(remaining) > 0 {
		t.Errorf("files remain: %v", remaining)
	}
}

func TestVersions(t *testing.T) {
	f := newFake(t)
	for _, version := range []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		t.Run(version, func(t *testing.T) {
			c := f.network(t, version)
			if !within(func() bool { return c.Ready() == nil }) {
				t.Fatalf("%v", c.Ready())
			}

			p, _ := newPod(t, sandboxID)
			ips, err := c.Add(t.Context(), p)
			if err != nil || len(ips) != 1 || ips[0] != netip.MustParseAddr("10.1.2.3") {
				t.Errorf("%v, %v", ips, err)
			}

			f.mode("")
			if err := c.Check(t.Context(), p); err != nil {
				t.Errorf("CHECK: %v", err)
			}

			if called := strings.Contains(f.calls(), "CHECK "+p.ID); called != (version != "0.3.1") {
				t.Errorf("CHECK called: %v", called)
			}

			f.mode("CHECK-error")
			if err := c.Check(t.Context(), p); (err == nil) != (version == "0.3.1") || err != nil &&
				!strings.Contains(err.Error(), "no address left") {
				t.Errorf("a failing CHECK: %v", err)
			}

			f.mode("")
			if err := c.Collect(t.Context()); err != nil {
				t.Errorf("GC: %v", err)
			}

			if called := strings.Contains(f.calls(), "GC "); called != (version == "1.1.0") {
				t.Errorf("GC called: %v", called)
			}

			want := `"cni.dev/valid-attachments":[{"containerID":"` + p.ID + `","ifname":"eth0"}]`
			if version == "1.1.0" && !strings.Contains(f.read("stdin.GC"), want) {
				t.Errorf("stdin of GC: %s, want %s", f.read("stdin.GC"), want)
			}

			if err := c.Del(t.Context(), p); err != nil || len(f.held()) > 0 {
				t.Errorf("DEL: %v", err)
			}
		})
	}
}

func TestStatusOfPlugins(t *testing.T) {
	f := newFake(t)
	f.mode("STATUS-error")
	c := f.network(t, "1.1.0")
	if err := c.Ready(); err == nil {
		t.Error("ready before STATUS")
	}

	if !within(func() bool {
		err := c.Ready()
		return err != nil && strings.Contains(err.Error(), "no address left")
	}) {
		t.Errorf("%v", c.Ready())
	}

	f.mode("")
	if !within(func() bool { return c.Ready() == nil }) {
		t.Errorf("%v", c.Ready())
	}
}

// TestPluginVanishes uninstalls the only plugin of a network while a pod runs. The pod can be
// removed, and the plugin releases its resources after its return.
func TestPluginVanishes(t *testing.T) {
	f := newFake(t)
	c := f.network(t, "1.0.0")
	p, _ := newPod(t, sandboxID)
	add(t, c, p)
	file := filepath.Join(f.dir, "fake")
	if err := os.Rename(file, file+".uninstalled"); err != nil {
		t.Fatal(err)
	}

	want := `CNI plugin "fake" is not in ` + f.dir + ": install it"
	if err := c.Ready(); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("Ready: %v, want %q", err, want)
	}

	if err := c.Del(t.Context(), p); err != nil || len(c.Attached()) > 0 {
		t.Errorf("Del: %v, attached %v", err, c.Attached())
	}

	if err := os.Rename(file+".uninstalled", file); err != nil {
		t.Fatal(err)
	}

	c.attach.retryDeferred(t.Context(), time.Now())
	if len(f.held()) > 0 {
		t.Errorf("after reinstallation: held %v", f.held())
	}
}

// TestPluginsAtOnce starts more pods than the number of concurrent plugins. The others wait for a
// slot, which does not count towards their timeout.
func TestPluginsAtOnce(t *testing.T) {
	f := newFake(t)
	c := f.network(t, "1.0.0")
	if err := os.WriteFile(filepath.Join(f.dir, "slow"), nil, 0o644); err != nil {
		t.Fatal(err)
	}

	f.mode("ADD-slow")
	var wg sync.WaitGroup
	for i := range maxConcurrentPlugins + 4 {
		p, _ := newPod(t, fmt.Sprintf("%064x", i))
		wg.Go(func() {
			if _, err := c.Add(t.Context(), p); err != nil {
				t.Error(err)
			}
		})
	}

	if !within(func() bool { return len(f.held()) == maxConcurrentPlugins }) {
		t.Errorf("%d plugins run", len(f.held()))
	}

	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()

	late, _ := newPod(t, sandboxID)
	if _, err := c.Add(ctx, late); !errors.Is(err, context.DeadlineExceeded) || len(f.held()) != maxConcurrentPlugins {
		t.Errorf("one more: %v, %d plugins run", err, len(f.held()))
	}

	if err := os.Remove(filepath.Join(f.dir, "slow")); err != nil {
		t.Fatal(err)
	}

	wg.Wait()
}

// TestPluginIsBeingReplaced runs a plugin while its file is being replaced.
func TestPluginIsBeingReplaced(t *testing.T) {
	f := newFake(t)
	c := f.network(t, "1.0.0")
	p, _ := newPod(t, sandboxID)
	busy, err := os.OpenFile(filepath.Join(f.dir, "fake"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}

	if _, _, err := (&plugins{}).run(t.Context(), busy.Name(), nil, nil); !errors.Is(err, syscall.ETXTBSY) {
		t.Errorf("the file is not busy: %v", err)
	}

	time.AfterFunc(busyInterval/2, func() { busy.Close() })
	if _, err := c.Add(t.Context(), p); err != nil {
		t.Error(err)
	}
}

// TestGCWaitsForNoADD verifies that GC runs beside no ADD, stops with its ctx, and does not block
// other ADDs. An ADD waiting for GC stops with its ctx.
func TestGCWaitsForNoADD(t *testing.T) {
	f := newFake(t)
	c := f.network(t, "1.1.0")
	if err := c.attach.activeAdds.Acquire(t.Context(), 1); err != nil { // a hanging ADD
		t.Fatal(err)
	}

	ctx, cancel := context.WithCancel(t.Context())
	collected := make(chan error, 1)
	go func() { collected <- c.Collect(ctx) }()
	p, _ := newPod(t, sandboxID)
	if _, err := c.Add(t.Context(), p); err != nil {
		t.Errorf("ADD while GC waits: %v", err)
	}

	cancel()
	if err := <-collected; !errors.Is(err, context.Canceled) || strings.Contains(f.calls(), "GC ") {
		t.Errorf("GC beside an ADD: %v", err)
	}

	c.attach.activeAdds.Release(1)
	if err := c.Collect(t.Context()); err != nil || !strings.Contains(f.calls(), "GC ") {
		t.Errorf("GC: %v", err)
	}

	if !c.attach.activeAdds.TryAcquire(maxActiveAdds) { // a hanging GC
		t.Fatal("GC has not ended")
	}

	ctx, cancel = context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()

	other, _ := newPod(t, strings.Repeat("b", 64))
	if _, err := c.Add(ctx, other); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("ADD during GC: %v", err)
	}
}

// TestReloadHonoursContext verifies that waiting for another reload ends with ctx.
func TestReloadHonoursContext(t *testing.T) {
	c := newFake(t).network(t, "1.0.0")
	unlock, err := c.reading.Lock(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()

	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()

	c.Reload(ctx) // returns
}
