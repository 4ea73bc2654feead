package podnet

import (
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

var ports = []*runtimeapi.PortMapping{{HostPort: 8080, ContainerPort: 80}}

// oldCache returns the cache of a network. edit changes the pod's entry to that of an older shim.
func oldCache(
	t *testing.T, f fake, p Pod, edit func(entry map[string]json.RawMessage) map[string]json.RawMessage,
) (cache string) {
	t.Helper()
	c := f.network(t, "0.4.0")
	add(t, c, p)
	cache = c.cfg.CacheDir
	files, err := filepath.Glob(filepath.Join(cache, "results/*"))
	if err != nil || len(files) != 1 {
		t.Fatalf("%v, %v", files, err)
	}

	b, err := os.ReadFile(files[0])
	var entry map[string]json.RawMessage
	if err == nil {
		err = json.Unmarshal(b, &entry)
	}

	if err == nil {
		b, err = json.Marshal(edit(entry))
	}

	if err == nil {
		err = os.WriteFile(files[0], b, 0o600)
	}

	if err != nil {
		t.Fatal(err)
	}

	return cache
}

// TestDelOfOldShimEntry releases pods with entries of older shims. The plugin gets the host ports,
// and nothing is left behind.
func TestDelOfOldShimEntry(t *testing.T) {
	type entry = map[string]json.RawMessage
	for name, c := range map[string]struct {
		edit func(entry) entry
		ips  bool // whether the cache has the addresses
	}{
		"of a list, without capabilities": {func(e entry) entry { delete(e, "capabilityArgs"); return e }, true},
		"of a single plugin": {func(e entry) entry {
			e["config"], _ = json.Marshal([]byte(`{"cniVersion":"0.1.0","name":"net","type":"fake",` +
				`"capabilities":{"portMappings":true}}`))
			delete(e, "capabilityArgs")
			return e
		}, true},
		"a result alone": {func(e entry) entry {
			var result entry
			_ = json.Unmarshal(e["result"], &result)
			return result
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			p, cmd := newPod(t, sandboxID)
			cache := oldCache(t, f, p, c.edit)
			conf := t.TempDir()
			writeConf(t, filepath.Join(conf, "10.conflist"), "net", "0.4.0")
			restarted := newCNI(t, conf, f.dir, cache)
			if ips := restarted.IPs(p.ID); (ips != nil) != c.ips {
				t.Errorf("addresses: %v", ips)
			}

			restarted.Adopt(p.ID)
			if got := restarted.Attached(); !cmp.Equal(got, []string{p.ID}) {
				t.Errorf("attached: %v", got)
			}

			f.mode("")
			_ = cmd.Process.Kill() // the pause process has exited
			p.NetNS, p.Ports, p.Foreign = "", ports, true
			for range 2 {
				if err := restarted.Del(t.Context(), p); err != nil {
					t.Error(err)
				}
			}

			if want := `"portMappings":[{"hostPort":8080,"containerPort":80,` +
				`"protocol":"tcp"}]`; !strings.Contains(f.read("stdin.DEL"), want) {
				t.Errorf("the plugin did not get %s:\n%s", want, f.read("stdin.DEL"))
			}

			if want := "DEL " + p.ID + " eth0"; !strings.Contains(f.calls(), want) {
				t.Errorf("calls: %s", f.calls())
			}

			remaining, _ := filepath.Glob(filepath.Join(cache, "results/*"))
			if len(remaining) > 0 || len(f.held()) > 0 ||
				len(restarted.Attached()) > 0 {
				t.Errorf("files remain: %v, held: %v, attached: %v", remaining, f.held(), restarted.Attached())
			}
		})
	}
}

// TestForeignPodsAreNotCollected runs GC for an adopted pod without a cache entry.
func TestForeignPodsAreNotCollected(t *testing.T) {
	f := newFake(t)
	c := f.network(t, "1.1.0")
	c.Adopt(sandboxID)
	if err := c.Collect(t.Context()); err != nil {
		t.Fatal(err)
	}

	if !strings.Contains(f.read("stdin.GC"), sandboxID) {
		t.Errorf("GC would release the pod: %s", f.read("stdin.GC"))
	}
}

func TestDelOfForeignPodRequiresConfiguration(t *testing.T) {
	f := newFake(t)
	c := newCNI(t, t.TempDir(), f.dir, t.TempDir())
	if err := c.Del(t.Context(), Pod{ID: sandboxID, Foreign: true}); !errdefs.IsUnavailable(err) {
		t.Errorf("%v", err)
	}

	if err := c.Del(t.Context(), Pod{ID: sandboxID}); err != nil {
		t.Errorf("of our own pod, missing from the cache: %v", err)
	}
}

func TestAddresses(t *testing.T) {
	k := newKubenet(t, t.TempDir(), "10.94.0.0/24", "fd00:94::/64")
	p, cmd := newPod(t, sandboxID)
	if got := Addresses(sandboxID, cmd.Process.Pid); got != nil {
		t.Errorf("without an interface: %v", got)
	}

	want, err := k.Add(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}

	same := cmp.Comparer(func(a, b netip.Addr) bool { return a == b })
	if got := NewPins(t.TempDir(), t.TempDir()).Addresses(sandboxID, cmd.Process.Pid); !cmp.Equal(got, want, same) {
		t.Errorf("%v, want %v", got, want)
	}

	other := strings.Repeat("b", 64)
	if got := Addresses(model.ContainerID(other), cmd.Process.Pid); got != nil {
		t.Errorf("of another sandbox's process: %v", got)
	}

	del(t, k, p)
	if got := Addresses(sandboxID, 0); got != nil {
		t.Errorf("without a process: %v", got)
	}
}

func TestReadCache(t *testing.T) {
	f := newFake(t)
	c := f.network(t, "1.0.0")
	p, _ := newPod(t, sandboxID)
	p.Ports = []*runtimeapi.PortMapping{{
		HostPort:      5353,
		ContainerPort: 53,
		Protocol:      runtimeapi.Protocol_UDP,
		HostIp:        "127.0.0.1",
	}}

	add(t, c, p)
	broken := `{"kind":"cniCacheV1","containerId":"bb","ifName":"eth0","networkName":"other","config":"e30="}`
	if err := os.WriteFile(filepath.Join(c.cfg.CacheDir, "results/other-bb-eth0"), []byte(broken), 0o600); err != nil {
		t.Fatal(err)
	}

	got, err := ReadCache(c.cfg.CacheDir)
	if err != nil || len(got) != 2 || got["bb"].Problem == "" {
		t.Fatalf("%+v, %v", got, err)
	}

	want := Connection{
		Network:   "net",
		Plugins:   []string{"fake"},
		Addresses: []netip.Addr{netip.MustParseAddr("10.1.2.3")},
		Ports:     p.Ports,
		MapsPorts: true,
	}
	if diff := cmp.Diff(want, got[p.ID], protocmp.Transform(), cmp.Comparer(func(a, b netip.Addr) bool {
		return a == b
	})); diff != "" {
		t.Error(diff)
	}

	if got, err := ReadCache(filepath.Join(c.cfg.CacheDir, "missing")); err != nil || len(got) != 0 {
		t.Errorf("%v, %v", got, err)
	}
}

func TestListFromBytes(t *testing.T) {
	for in, want := range map[string]string{
		`{"cniVersion":"0.1.0","name":"kubenet","type":"bridge"}`:                 "kubenet bridge",
		`{"cniVersion":"0.4.0","name":"a","plugins":[{"type":"x"},{"type":"y"}]}`: "a x y",
		`{"cniVersion":"0.4.0","name":"a","type":"t","plugins":[{"type":"x"}]}`:   "a x",
		`{"name":"a"}`: "", `[]`: "", ``: "",
	} {
		t.Run(in, func(t *testing.T) {
			list, err := listFromBytes([]byte(in))
			if want == "" {
				if err == nil {
					t.Errorf("%s: %+v", in, list)
				}
				return
			}

			if err != nil || describe(list) != want {
				t.Errorf("%s: %v, %v", in, list, err)
			}
		})
	}
}

func describe(l *libcni.NetworkConfigList) string {
	s := l.Name
	for _, p := range l.Plugins {
		s += " " + p.Network.Type
	}
	return s
}
