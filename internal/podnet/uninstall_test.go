package podnet

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cri-dockerd/internal/model"
)

// chain returns a network of the fake plugin and a second one, "mesh". The latter records its
// commands in "mesh-calls" and returns the previous result.
func (f fake) chain(t *testing.T) (c *CNI, mesh string, log *bytes.Buffer) {
	t.Helper()
	mesh = filepath.Join(f.dir, "mesh")
	script := "#!/bin/sh\ncat > " + f.dir + "/mesh-stdin\necho $CNI_COMMAND >> " + f.dir + "/mesh-calls\n" +
		`[ "$CNI_COMMAND" != ADD ] || sed 's/.*"prevResult":\({.*}\),"type".*/\1/' ` + f.dir + "/mesh-stdin\n"
	conf := filepath.Join(t.TempDir(), "10.conflist")
	text := `{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"fake"},{"type":"mesh"}]}`
	if err := errors.Join(
		os.WriteFile(mesh, []byte(script), 0o755),
		os.WriteFile(conf, []byte(text), 0o644),
	); err != nil {
		t.Fatal(err)
	}

	log = &bytes.Buffer{}
	c, err := NewCNI(CNIConfig{
		ConfDir:  filepath.Dir(conf),
		BinDirs:  []string{f.dir},
		CacheDir: t.TempDir(),
		Log:      slog.New(slog.NewTextHandler(log, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}

	t.Cleanup(func() { c.Close() })

	return c, mesh, log
}

// podFiles returns the files of pods in the cache and the journal.
func podFiles(c *CNI, dirs ...string) (all []string) {
	for _, dir := range dirs {
		found, _ := filepath.Glob(filepath.Join(c.cfg.CacheDir, dir, "*"))
		all = append(all, found...)
	}
	return all
}

// TestUninstalledPlugin uninstalls a plugin of a chain while a pod runs. The other plugins release
// their resources with the result of the ADD, and the pod can be removed. The missing plugin's
// resources are reported once. They are released after its return, also by another process.
func TestUninstalledPlugin(t *testing.T) {
	f := newFake(t)
	c, mesh, log := f.chain(t)
	p, _ := newPod(t, sandboxID)
	add(t, c, p)
	if err := os.Rename(mesh, mesh+".uninstalled"); err != nil {
		t.Fatal(err)
	}

	for range 2 {
		if err := c.Del(t.Context(), p); err != nil {
			t.Fatal(err)
		}
		p.NetNS = ""
	}

	if len(f.held()) > 0 || len(c.Attached()) > 0 || len(podFiles(c, "results", "pending", "set-aside")) > 0 {
		t.Errorf("held %v, attached %v, files %v", f.held(), c.Attached(), podFiles(c, "*"))
	}
	if in := f.read("stdin.DEL"); !strings.Contains(in, `"prevResult":{`) || !strings.Contains(in, "10.1.2.3/24") {
		t.Errorf("the remaining plugin did not get the result: %s", in)
	}
	if n := strings.Count(log.String(), "plugins=mesh "); n != 1 || !strings.Contains(log.String(), "pod=default/web") {
		t.Errorf("reported %d times:\n%s", n, log)
	}

	c.attach.retryDeferred(t.Context(), time.Now())
	if len(podFiles(c, "owed/results")) != 1 {
		t.Error("the deferred DEL is lost")
	}
	if err := os.Rename(mesh+".uninstalled", mesh); err != nil {
		t.Fatal(err)
	}

	next, err := NewCNI(c.cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close()

	if got := next.Attached(); len(got) > 0 {
		t.Errorf("attached after a restart: %v", got)
	}

	next.attach.retryDeferred(t.Context(), time.Now())
	if calls := f.read("mesh-calls"); !strings.Contains(calls, "DEL") ||
		!strings.Contains(f.read("mesh-stdin"), "10.1.2.3/24") {
		t.Errorf("after reinstallation: %q", calls)
	}

	if remaining := podFiles(c, "owed/results"); len(remaining) > 0 {
		t.Errorf("files remain: %v", remaining)
	}
}

// TestPluginNeverComesBack verifies that its deferred DELs expire.
func TestPluginNeverComesBack(t *testing.T) {
	f := newFake(t)
	c, mesh, log := f.chain(t)
	p, _ := newPod(t, sandboxID)
	add(t, c, p)
	if err := errors.Join(os.Remove(mesh), c.Del(t.Context(), p)); err != nil {
		t.Fatal(err)
	}

	c.attach.retryDeferred(t.Context(), time.Now().Add(deferredMaxAge/2))
	if len(podFiles(c, "owed/results")) != 1 {
		t.Error("dropped too early")
	}

	c.attach.retryDeferred(t.Context(), time.Now().Add(deferredMaxAge+time.Minute))
	remaining := podFiles(c, "owed/results")
	if len(remaining) > 0 || !strings.Contains(log.String(), "were not reinstalled") {
		t.Errorf("files %v; log:\n%s", remaining, log)
	}
}

// TestPluginIsBackAndFails verifies that a DEL stays deferred until it succeeds, also after an
// interrupted ADD, which has no result.
func TestPluginIsBackAndFails(t *testing.T) {
	f := newFake(t)
	c, mesh, _ := f.chain(t)
	p, _ := newPod(t, sandboxID)
	list, _, err := c.config()
	if err != nil {
		t.Fatal(err)
	}

	rt, err := runtimeConf(list, p, nil)
	if err != nil {
		t.Fatal(err)
	}

	note, err := c.attach.journal.begin(list, rt, unconfirmed)
	if err != nil {
		t.Fatal(err)
	}

	note.Close()
	if err := errors.Join(os.Rename(mesh, mesh+".uninstalled"), c.Del(t.Context(), p)); err != nil {
		t.Fatal(err)
	}

	f.mode("DEL-error")
	if err := os.Rename(mesh+".uninstalled", mesh); err != nil {
		t.Fatal(err)
	}

	now := time.Now()
	c.attach.retryDeferred(t.Context(), now)
	if len(podFiles(c, "owed/results")) != 1 {
		t.Fatal("dropped although its DEL failed")
	}

	f.mode("")
	c.attach.retryDeferred(t.Context(), now.Add(deferredRetryInterval/2))
	if f.calls() != "" {
		t.Errorf("retried at once: %s", f.calls())
	}

	c.attach.retryDeferred(t.Context(), now.Add(deferredRetryInterval+time.Second))
	if remaining := podFiles(c, "owed/results"); len(remaining) > 0 {
		t.Errorf("files remain: %v", remaining)
	}
}

// TestPluginThatWasNeverThere verifies that the ADD fails with the plugin's name before any plugin
// runs, and that nothing is left behind.
func TestPluginThatWasNeverThere(t *testing.T) {
	f := newFake(t)
	c, mesh, _ := f.chain(t)
	if err := os.Remove(mesh); err != nil {
		t.Fatal(err)
	}

	p, _ := newPod(t, sandboxID)
	if _, err := c.Add(t.Context(), p); err == nil || !strings.Contains(err.Error(), `CNI plugin "mesh" is not in `) {
		t.Errorf("%v", err)
	}

	if f.calls() != "" || len(c.Attached()) > 0 {
		t.Errorf("calls %q, attached %v", f.calls(), c.Attached())
	}
	if err := c.Del(t.Context(), p); err != nil { // like the undo
		t.Error(err)
	}

	remaining := podFiles(c, "results", "pending", "set-aside", "owed/results")
	if len(remaining) > 0 || len(c.Attached()) > 0 {
		t.Errorf("files remain: %v, attached %v", remaining, c.Attached())
	}
}

// TestIPAMProgramIsUninstalled verifies that the pod need not wait for the program. All resources,
// including masquerading rules, are released after its return.
func TestIPAMProgramIsUninstalled(t *testing.T) {
	bin := t.TempDir()
	for _, name := range KubenetPlugins() {
		if err := os.Symlink(filepath.Join(pluginDir, name), filepath.Join(bin, name)); err != nil {
			t.Fatal(err)
		}
	}

	k := newKubenet(t, t.TempDir(), "10.94.0.0/24")
	k.attach.binDirs, k.cfg.BinDirs = []string{bin}, []string{bin}
	p, _ := newPod(t, sandboxID)
	if _, err := k.Add(t.Context(), p); err != nil {
		t.Fatal(err)
	}

	if err := errors.Join(k.Confirm(p.ID), os.Remove(filepath.Join(bin, "host-local"))); err != nil {
		t.Fatal(err)
	}

	for range 2 {
		err := k.Del(t.Context(), p)
		var missing *MissingPluginError
		if !errors.As(err, &missing) || missing.Program != "host-local" ||
			!strings.Contains(err.Error(), `CNI plugin "host-local" is not in `) {
			t.Fatalf("%v", err)
		}
	}

	if got := k.Attached(); len(got) != 1 {
		t.Errorf("attached: %v", got)
	}
	if err := os.Symlink(filepath.Join(pluginDir, "host-local"), filepath.Join(bin, "host-local")); err != nil {
		t.Fatal(err)
	}

	del(t, k, p)
	remaining, _ := filepath.Glob("/var/lib/cni/networks/kubenet/10.94.*")
	if len(remaining) > 0 || len(k.Attached()) > 0 {
		t.Errorf("addresses remain: %v, attached: %v", remaining, k.Attached())
	}
	if rules := run(t, "iptables-save"); strings.Contains(rules, "10.94.0.") {
		t.Errorf("rules remain:\n%s", rules)
	}
}

// TestIPAMProgramReturnsDuringDEL verifies that a Del that found the program missing names it, even
// if it is installed before the Del ends. The next Del releases the address.
func TestIPAMProgramReturnsDuringDEL(t *testing.T) {
	f := newFake(t)
	program, conf := filepath.Join(f.dir, "host-local"), filepath.Join(t.TempDir(), "10.conflist")
	script := "#!/bin/sh\ncat > " + f.dir + "/stdin\n" +
		`[ "$CNI_COMMAND" != ADD ] || sed 's/.*"prevResult":\({.*}\),"type".*/\1/' ` + f.dir + "/stdin\n" +
		`[ "$CNI_COMMAND" != DEL ] || touch ` + program + "\n[ ! -e " + program + " ] || chmod +x " + program + "\n"
	text := `{"cniVersion":"1.0.0","name":"net","plugins":[
		{"type":"dummy","ipam":{"type":"host-local"}},{"type":"mesh"}]}`
	if err := errors.Join(
		os.Link(filepath.Join(f.dir, "fake"), filepath.Join(f.dir, "dummy")),
		os.WriteFile(filepath.Join(f.dir, "mesh"), []byte(script), 0o755),
		os.WriteFile(program, nil, 0o755),
		os.WriteFile(conf, []byte(text), 0o644),
	); err != nil {
		t.Fatal(err)
	}

	c := newCNI(t, filepath.Dir(conf), f.dir, t.TempDir())
	p, _ := newPod(t, sandboxID)
	add(t, c, p)
	if err := os.Remove(program); err != nil {
		t.Fatal(err)
	}

	err := c.Del(t.Context(), p)
	var missing *MissingPluginError
	if !errors.As(err, &missing) || !strings.Contains(err.Error(), `CNI plugin "host-local" is not in `) {
		t.Fatalf("%v", err)
	}
	if err := c.Del(t.Context(), p); err != nil || len(f.held()) > 0 || len(c.Attached()) > 0 {
		t.Errorf("%v, held %v, attached %v", err, f.held(), c.Attached())
	}
}

// azure is a configuration with the main plugin's own IPAM.
const azure = `{"cniVersion":"0.3.0","name":"azure","plugins":[
	{"type":"azure-vnet","mode":"transparent","ipam":{"type":"azure-cns","mode":"v4overlay"}},
	{"type":"meta","capabilities":{"portMappings":true},"snat":true}]}`

// TestIPAMOfThePluginItself verifies that the IPAM section names a program only for delegating
// plugins.
func TestIPAMOfThePluginItself(t *testing.T) {
	f := newFake(t)
	conf := filepath.Join(t.TempDir(), "10-azure.conflist")
	if err := errors.Join(
		os.WriteFile(conf, []byte(azure), 0o644),
		os.Link(filepath.Join(f.dir, "fake"), filepath.Join(f.dir, "azure-vnet")),
		os.Link(filepath.Join(f.dir, "fake"), filepath.Join(f.dir, "meta")),
	); err != nil {
		t.Fatal(err)
	}

	c := newCNI(t, filepath.Dir(conf), f.dir, t.TempDir())
	if err := c.Ready(); err != nil {
		t.Error(err)
	}

	p, _ := newPod(t, sandboxID)
	add(t, c, p)
	if err := c.Del(t.Context(), p); err != nil || len(f.held()) > 0 {
		t.Errorf("%v, held %v", err, f.held())
	}

	files, err := Inspect(filepath.Dir(conf), func(string) error { return nil })
	if err != nil || len(files) != 1 || strings.Contains(fmt.Sprint(files[0].Plugins), "azure-cns") {
		t.Errorf("%v, %v", files, err)
	}
}

// TestStaleConfiguration sorts the configuration of a removed add-on before a valid one. It is
// reported, and used only after its plugin is installed.
func TestStaleConfiguration(t *testing.T) {
	f := newFake(t)
	conf := t.TempDir()
	stale := `{"cniVersion":"0.3.0","name":"weave","plugins":[{"name":"weave","type":"weave-net","hairpinMode":true}]}`
	if err := os.WriteFile(filepath.Join(conf, "05-weave.conflist"), []byte(stale), 0o644); err != nil {
		t.Fatal(err)
	}

	writeConf(t, filepath.Join(conf, "10-good.conflist"), "good", "1.0.0")
	c := newCNI(t, conf, f.dir, t.TempDir())
	uses := func() string { list, _, _ := c.config(); return list.Name }
	if err := c.Ready(); err != nil || uses() != "good" {
		t.Errorf("%v, network %s", err, uses())
	}

	if n := c.Notice(); !strings.Contains(n, "05-weave.conflist") || !strings.Contains(n, `"weave-net"`) {
		t.Errorf("notice %q", n)
	}

	weave := filepath.Join(f.dir, "weave-net")
	if err := os.Link(filepath.Join(f.dir, "fake"), weave); err != nil {
		t.Fatal(err)
	}

	if !within(func() bool { return c.Ready() == nil && uses() == "weave" }) || c.Notice() != "" {
		t.Errorf("after its installation: %v, network %s, notice %q", c.Ready(), uses(), c.Notice())
	}
	if err := os.Remove(weave); err != nil {
		t.Fatal(err)
	}

	if !within(func() bool { return c.Ready() == nil && uses() == "good" }) {
		t.Errorf("after its removal: %v, network %s", c.Ready(), uses())
	}
	if err := os.Remove(filepath.Join(conf, "10-good.conflist")); err != nil {
		t.Fatal(err)
	}

	if !within(func() bool {
		err := c.Ready()
		return err != nil && strings.Contains(err.Error(), `"weave-net" is not in`)
	}) {
		t.Errorf("without the valid configuration: %v", c.Ready())
	}
}

// TestLoopbackIsNoNetwork verifies that a configuration with only lo is not used.
func TestLoopbackIsNoNetwork(t *testing.T) {
	f := newFake(t)
	conf := t.TempDir()
	for name, text := range map[string]string{
		"00-lo.conflist": `{"cniVersion":"1.0.0","name":"lo","plugins":[{"type":"loopback"},{"type":"portmap"}]}`,
		"99-lo.conf":     `{"cniVersion":"1.0.0","name":"lo","type":"loopback"}`,
	} {
		if err := os.WriteFile(filepath.Join(conf, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}

	for _, name := range []string{"loopback", "portmap"} {
		if err := os.Link(filepath.Join(f.dir, "fake"), filepath.Join(f.dir, name)); err != nil {
			t.Fatal(err)
		}
	}

	c := newCNI(t, conf, f.dir, t.TempDir())
	if err := c.Ready(); err == nil || !strings.Contains(err.Error(), "assigns no pod addresses") {
		t.Errorf("%v", err)
	}

	writeConf(t, filepath.Join(conf, "10-good.conflist"), "good", "1.0.0")
	if !within(func() bool { return c.Ready() == nil }) {
		t.Errorf("with a valid configuration between them: %v", c.Ready())
	}
}

// torn returns possible contents of a file after a crash: each of its prefixes, and other data.
func torn(whole []byte) (all [][]byte) {
	for n := range whole {
		all = append(all, whole[:n])
	}

	for _, other := range []string{"null", "{}", "[]", `"x"`, "5", "{}{}", strings.Repeat("\x00", 4096),
		`{"kind":"cniCacheV1"}`,
		`{"kind":5,"containerId":{},"config":[]}`, `{"ips":[]}`, "\xff\xfe", strings.Repeat("[", 100000)} {
		all = append(all, []byte(other))
	}

	return all
}

// TestTornFiles verifies that a pod can be released with any torn cache entry or record. The
// plugins' reservations are released, and nothing of the pod is left behind.
func TestTornFiles(t *testing.T) {
	dir, conf := t.TempDir(), filepath.Join(t.TempDir(), "10.conflist")
	// It runs a thousand times, so it starts no child process.
	script := "#!/bin/sh\n[ $CNI_COMMAND != DEL ] || : > " + dir + "/released\n" +
		"[ $CNI_COMMAND != ADD ] || echo '{\"cniVersion\":\"1.0.0\",\"ips\":[{\"address\":\"10.1.2.3/24\"}]}'\n"
	text := `{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"small"}]}`
	if err := errors.Join(os.WriteFile(filepath.Join(dir, "small"), []byte(script), 0o755),
		os.WriteFile(conf, []byte(text), 0o644)); err != nil {
		t.Fatal(err)
	}

	network := func(cache string) *CNI {
		c, err := NewCNI(CNIConfig{ConfDir: filepath.Dir(conf), BinDirs: []string{dir}, CacheDir: cache, Log: discard})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}

	p, _ := newPod(t, sandboxID)
	first := network(t.TempDir())
	if _, err := first.Add(t.Context(), p); err != nil {
		t.Fatal(err)
	}

	p.NetNS = "" // so that only files indicate the resources

	for _, file := range []string{"results/n-" + sandboxID + "-eth0", "pending/" + sandboxID} {
		whole, err := os.ReadFile(filepath.Join(first.cfg.CacheDir, file))
		if err != nil {
			t.Fatal(err)
		}

		cache := t.TempDir()
		if err := os.MkdirAll(filepath.Dir(filepath.Join(cache, file)), 0o700); err != nil {
			t.Fatal(err)
		}

		c := network(cache)
		for i, content := range torn(whole) {
			if err := os.WriteFile(filepath.Join(cache, file), content, 0o600); err != nil {
				t.Fatal(err)
			}

			if i%50 == 0 { // otherwise the file is torn while the daemon runs
				c = network(cache)
				if got := c.Attached(); len(got) != 1 {
					t.Fatalf("%s, %.60q: attached %v", file, content, got)
				}
			}

			err := c.Del(t.Context(), p)
			if _, statErr := os.Stat(filepath.Join(dir, "released")); err != nil || statErr != nil ||
				len(c.Attached()) > 0 {
				t.Fatalf("%s, %d bytes, %.60q: %v, %v", file, len(content), content, err, statErr)
			}

			if remaining := podFiles(c, "results", "pending", "set-aside"); len(remaining) > 0 {
				t.Fatalf("%s, %d bytes: files remain: %v", file, len(content), remaining)
			}

			_ = os.Remove(filepath.Join(dir, "released"))
		}
	}
}

// TestFilesOfTheWrongKind puts a non-empty directory in the place of an entry, a record or a file
// set aside, and a file in the place of a directory.
func TestFilesOfTheWrongKind(t *testing.T) {
	f := newFake(t)
	entry := "results/net-" + sandboxID + "-eth0"
	for name, wrong := range map[string][]string{
		"an entry":            {entry},
		"a record":            {"pending/" + sandboxID},
		"an entry, again":     {entry, "set-aside/net-" + sandboxID + "-eth0"},
		"a record, again":     {"pending/" + sandboxID, "set-aside/" + sandboxID},
		"an entry and record": {entry, "pending/" + sandboxID},
	} {
		t.Run(name, func(t *testing.T) {
			c := f.network(t, "1.0.0")
			p, _ := newPod(t, sandboxID)
			if _, err := c.Add(t.Context(), p); err != nil {
				t.Fatal(err)
			}

			if !strings.Contains(name, "record") { // a complete pod has no record
				if err := c.Confirm(p.ID); err != nil {
					t.Fatal(err)
				}
			}

			for _, file := range wrong {
				path := filepath.Join(c.cfg.CacheDir, file)
				if err := errors.Join(os.RemoveAll(path), os.MkdirAll(filepath.Join(path, "x"), 0o700)); err != nil {
					t.Fatal(err)
				}
			}

			p.NetNS = ""
			next, err := NewCNI(c.cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer next.Close()

			if err := next.Del(t.Context(), p); err != nil || len(f.held()) > 0 || len(next.Attached()) > 0 {
				t.Errorf("%v, held %v, attached %v", err, f.held(), next.Attached())
			}
		})
	}

	for _, dir := range []string{"results", "pending"} {
		cache := t.TempDir()
		if err := os.WriteFile(filepath.Join(cache, dir), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}

		conf := t.TempDir()
		writeConf(t, filepath.Join(conf, "10.conflist"), "net", "1.0.0")
		c := newCNI(t, conf, f.dir, cache)
		p, _ := newPod(t, sandboxID)
		add(t, c, p)
		del(t, c, p)
		if len(f.held()) > 0 {
			t.Errorf("%s: held %v", dir, f.held())
		}
	}
}

// TestPinNames verifies the form expected by add-ons, and that names are stable.
func TestPinNames(t *testing.T) {
	if got, want := pinName(sandboxID), pinName(model.ContainerID(sandboxID)); got != want || !isPinName(got) {
		t.Errorf("%s", got)
	}
	if pinName(sandboxID) == pinName(model.ContainerID(strings.Repeat("b", 64))) {
		t.Error("two sandboxes have the same name")
	}
}
