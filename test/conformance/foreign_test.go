package conformance

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	cniversion "github.com/containernetworking/cni/pkg/version"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
)

// olderShim is an older shim and the characteristics of its pods.
type olderShim struct {
	name string
	root string // root directory in the node
	// The names of containers are the only record of the metadata; some have a seventh part.
	terse bool
	// The CNI cache has an entry for loopback next to that for eth0.
	single bool
	// Converts a cache entry to the format of its libcni.
	cache func(entry map[string]json.RawMessage) (converted map[string]json.RawMessage)
	// Configuration of its kubenet plugin, used instead of CNI.
	kubenet string
}

// olderShims returns the three supported older shims. newRoot is the root directory shared by the
// two newer ones and our daemon.
func olderShims(newRoot string) []olderShim {
	kept := func(e map[string]json.RawMessage) map[string]json.RawMessage { return e }

	return []olderShim{
		{
			name:  "dockershim",
			root:  "/var/lib/dockershim",
			terse: true,
			cache: func(e map[string]json.RawMessage) map[string]json.RawMessage {
				var result map[string]json.RawMessage // libcni before 0.8 cached the result alone
				_ = json.Unmarshal(e["result"], &result)
				return result
			},
		},
		{
			name:   "0.2",
			root:   newRoot,
			single: true,
			cache: func(e map[string]json.RawMessage) map[string]json.RawMessage {
				delete(e, "capabilityArgs")
				return e
			},
		},
		{
			name:   "0.4",
			root:   newRoot,
			single: true,
			cache:  kept,
		},
	}
}

// foreignNode is a node with pods of older shims.
type foreignNode struct {
	*node
	client   *client.Client
	conf     string // CNI's configuration directory
	newRoot  string // root directory shared by older cri-dockerd and our daemon
	cni      *libcni.CNIConfig
	list     *libcni.NetworkConfigList
	podCount int
}

func newForeignNode(t *testing.T, n *node) *foreignNode {
	t.Helper()
	eng := n.own(t)
	f := &foreignNode{
		node:    n,
		client:  eng.Docker(t),
		conf:    filepath.Join(n.tempDir(t), "net.d"),
		newRoot: filepath.Join(eng.Dir, "lib-old"),
	}

	const conf = `{"cniVersion":"0.4.0","name":"cbr0","plugins":[
		{"type":"bridge","bridge":"cni0","isGateway":true,"ipMasq":true,"hairpinMode":true,
		"ipam":{"type":"host-local","ranges":[[{"subnet":"10.66.0.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}},
		{"type":"portmap","capabilities":{"portMappings":true},"snat":true}]}`
	if err := os.MkdirAll(f.conf, 0o755); err != nil {
		t.Fatal(err)
	}

	if err := os.WriteFile(filepath.Join(f.conf, "10-test.conflist"), []byte(conf), 0o644); err != nil {
		t.Fatal(err)
	}

	var err error
	if f.list, err = libcni.ConfListFromBytes([]byte(conf)); err != nil {
		t.Fatal(err)
	}

	f.cni = libcni.NewCNIConfigWithCacheDir([]string{"/usr/lib/cni"}, f.hostPath("/var/lib/cni/cache"),
		&pluginExec{engine: eng})

	return f
}

// hostPath returns the path of a node's directory as seen by the test process. (setup.sh mounts it
// in the node.)
func (f *foreignNode) hostPath(dir string) string { return filepath.Join(f.eng.Dir, "root", dir) }

// daemon starts our daemon in place of the older shim.
func (f *foreignNode) daemon(t *testing.T, args ...string) {
	t.Helper()
	flags := []string{
		"--network-plugin=cni",
		"--cni-conf-dir=" + f.conf,
		"--cni-bin-dir=/usr/lib/cni",
		"--pod-cidr=",
		"--cri-dockerd-root-directory=" + f.newRoot,
	}
	f.Daemon = f.eng.Daemon(t, append(flags, args...)...)
}

// pluginExec runs CNI plugins in the engine's namespaces.
type pluginExec struct {
	cniversion.PluginDecoder
	engine *engines.Engine
}

func (*pluginExec) FindInPath(plugin string, paths []string) (string, error) {
	p := filepath.Join(paths[0], plugin)
	_, err := os.Stat(p)
	return p, err
}

func (i *pluginExec) ExecPlugin(_ context.Context, plugin string, stdin []byte, environ []string) ([]byte, error) {
	cmd := i.engine.Command(plugin)
	cmd.Env, cmd.Stdin = append(cmd.Env, environ...), bytes.NewReader(stdin)
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", plugin, err, out)
	}
	return out, err
}

// foreignPod is a pod of an older shim.
type foreignPod struct {
	olderShim
	config             *runtimeapi.PodSandboxConfig
	sandbox, container string // IDs
	ip                 string
	log                string
	checkpoint         string // path as seen by the test process
	port               int    // host port
	pids               string // processes of pause and container before the takeover
}

// pod runs a pod of an older shim with a page at a host port.
func (f *foreignNode) pod(t *testing.T, a olderShim) *foreignPod {
	t.Helper()
	f.podCount++
	p := &foreignPod{olderShim: a, config: f.podConfig(t), port: 18100 + f.podCount}
	p.config.Labels = map[string]string{"app": a.name}
	p.config.Annotations = map[string]string{"example.org/note": "kept"}
	p.config.PortMappings = []*runtimeapi.PortMapping{{ContainerPort: 8080, HostPort: int32(p.port)}}
	p.sandbox = f.sandbox(t, p, "none")
	f.connect(t, p)
	f.writeCheckpoint(t, p)
	p.container, p.log = f.container(t, p, p.sandbox,
		"mkdir /www; echo page of "+p.config.Metadata.Name+" > /www/index.html; httpd -p 8080 -h /www; "+
			"echo first line; while :; do echo again; sleep 1; done")
	p.pids = f.processes(t, p)

	return p
}

// name returns the name of a container in the format of the older shim.
func (p *foreignPod) name(of string) string {
	m := p.config.Metadata
	s := fmt.Sprintf("k8s_%s_%s_%s_%s_%d", of, m.Name, m.Namespace, m.Uid, m.Attempt)
	if p.terse {
		s += "_deadbeef" // added after a name conflict
	}
	return s
}

// labels returns the labels of a container in the format of the older shim.
func (p *foreignPod) labels(kind, name string) map[string]string {
	l := map[string]string{"io.kubernetes.docker.type": kind, "io.kubernetes.container.name": name}
	if p.terse {
		return l
	}

	m := p.config.Metadata
	l["io.kubernetes.pod.name"] = m.Name
	l["io.kubernetes.pod.namespace"] = m.Namespace
	l["io.kubernetes.pod.uid"] = m.Uid
	for k, v := range p.config.Labels {
		l[k] = v
	}

	for k, v := range p.config.Annotations {
		l["annotation."+k] = v
	}

	return l
}

// runContainer creates and starts a container with Docker.
func (f *foreignNode) runContainer(t *testing.T, name string, c *container.Config, h *container.HostConfig) string {
	t.Helper()
	r, err := f.client.ContainerCreate(t.Context(), client.ContainerCreateOptions{Name: name, Config: c, HostConfig: h})
	if err == nil {
		_, err = f.client.ContainerStart(t.Context(), r.ID, client.ContainerStartOptions{})
	}

	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}

	return r.ID
}

// sandbox runs a pod's pause.
func (f *foreignNode) sandbox(t *testing.T, p *foreignPod, mode container.NetworkMode) string {
	t.Helper()
	h := &container.HostConfig{
		NetworkMode: mode,
		IpcMode:     container.IPCModeShareable,
		OomScoreAdj: -998,
		ShmSize:     64 << 20,
		SecurityOpt: []string{"no-new-privileges"},
		Resources:   container.Resources{CPUShares: 2, CgroupParent: p.config.Linux.CgroupParent},
	}

	c := &container.Config{
		Image:      f.image,
		Entrypoint: []string{"sleep", "100000"},
		Labels:     p.labels("podsandbox", "POD"),
	}
	if mode == "bridge" {
		port := network.MustParsePort("8080/tcp")
		c.ExposedPorts, h.PortBindings = network.PortSet{port: {}},
			network.PortMap{port: {{HostPort: fmt.Sprint(p.port)}}}
	}

	if mode != "host" {
		c.Hostname = p.config.Hostname
	}

	return f.runContainer(t, p.name("POD"), c, h)
}

// container runs a container with a link to Docker's log. It returns the ID and the link.
func (f *foreignNode) container(t *testing.T, p *foreignPod, sandbox, script string) (id, log string) {
	t.Helper()
	log = filepath.Join(p.config.LogDirectory, "main", "0.log")
	labels := p.labels("container", "main")
	labels["io.kubernetes.sandbox.id"], labels["io.kubernetes.container.logpath"] = sandbox, log
	h := &container.HostConfig{
		LogConfig: container.LogConfig{Type: "json-file"},
		Resources: container.Resources{CgroupParent: p.config.Linux.CgroupParent},
	}
	if f.inspect(t, sandbox).State.Running { // a stopped pause has no namespaces
		h.NetworkMode, h.IpcMode = container.NetworkMode("container:"+sandbox), container.IpcMode("container:"+sandbox)
	}

	id = f.runContainer(t, p.name("main"), &container.Config{
		Image:       f.image,
		Entrypoint:  sh(script),
		Labels:      labels,
		Healthcheck: &container.HealthConfig{Test: []string{"NONE"}},
	}, h)
	if err := os.MkdirAll(filepath.Dir(log), 0o755); err != nil {
		t.Fatal(err)
	}

	if err := os.Symlink(f.inspect(t, id).LogPath, log); err != nil {
		t.Fatal(err)
	}

	return id, log
}

func (f *foreignNode) inspect(t *testing.T, id string) container.InspectResponse {
	t.Helper()
	r, err := f.client.ContainerInspect(t.Context(), id, client.ContainerInspectOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return r.Container
}

// processes returns the PIDs and start times of pause and container.
func (f *foreignNode) processes(t *testing.T, p *foreignPod) string {
	t.Helper()
	var s string
	for _, id := range []string{p.sandbox, p.container} {
		in := f.inspect(t, id)
		s += fmt.Sprint(in.State.Pid, " ", in.State.StartedAt, " ", in.RestartCount, "\n")
	}
	return s
}

// connect connects a pod like the older shim and leaves the same CNI cache.
func (f *foreignNode) connect(t *testing.T, p *foreignPod) {
	t.Helper()
	netns := fmt.Sprintf("/proc/%d/ns/net", f.inspect(t, p.sandbox).State.Pid)
	m := p.config.Metadata
	rt := &libcni.RuntimeConf{
		ContainerID: p.sandbox,
		NetNS:       netns,
		IfName:      "eth0",
		Args: [][2]string{
			{"IgnoreUnknown", "1"},
			{"K8S_POD_NAMESPACE", m.Namespace},
			{"K8S_POD_NAME", m.Name},
			{"K8S_POD_INFRA_CONTAINER_ID", p.sandbox},
		},
		CapabilityArgs: map[string]any{"portMappings": []map[string]any{{
			"hostPort":      p.port,
			"containerPort": 8080,
			"protocol":      "tcp",
			"hostIP":        "",
		}}},
	}
	if p.kubenet != "" {
		f.connectKubenet(t, p, rt)
		return
	}

	result, err := f.cni.AddNetworkList(t.Context(), f.list, rt)
	if err != nil {
		t.Fatal(err)
	}

	if p.single {
		lo := &libcni.RuntimeConf{ContainerID: p.sandbox, NetNS: netns, IfName: "lo"}
		list, err := libcni.ConfListFromBytes([]byte(`{"cniVersion":"0.2.0","name":"cni-loopback",` +
			`"plugins":[{"type":"loopback"}]}`))
		if err == nil {
			_, err = f.cni.AddNetworkList(t.Context(), list, lo)
		}

		if err != nil {
			t.Fatal(err)
		}
	}

	p.ip = firstIP(t, result)
	f.rewriteCache(t, p.sandbox, p.cache)
}

// connectKubenet connects a pod like dockershim's kubenet: with one plugin and without port
// mappings, since kubenet sets up host ports itself.
func (f *foreignNode) connectKubenet(t *testing.T, p *foreignPod, rt *libcni.RuntimeConf) {
	t.Helper()
	conf, err := libcni.NetworkPluginConfFromBytes([]byte(p.kubenet))
	if err != nil {
		t.Fatal(err)
	}

	rt.CapabilityArgs = nil
	result, err := f.cni.AddNetwork(t.Context(), conf, rt)
	if err != nil {
		t.Fatal(err)
	}

	p.ip = firstIP(t, result)
}

func firstIP(t *testing.T, r types.Result) string {
	t.Helper()
	result, err := types100.NewResultFromResult(r)
	if err != nil || len(result.IPs) == 0 {
		t.Fatalf("no address in CNI result %v: %v", r, err)
	}
	return result.IPs[0].Address.IP.String()
}

// rewriteCache modifies a sandbox's entry in the CNI cache.
func (f *foreignNode) rewriteCache(
	t *testing.T, sandbox string, change func(map[string]json.RawMessage) map[string]json.RawMessage,
) {
	t.Helper()
	file := f.hostPath("/var/lib/cni/cache/results/cbr0-" + sandbox + "-eth0")
	b, err := os.ReadFile(file)
	var entry map[string]json.RawMessage
	if err == nil {
		err = json.Unmarshal(b, &entry)
	}

	if err == nil {
		b, err = json.Marshal(change(entry))
	}

	if err == nil {
		err = os.WriteFile(file, b, 0o600)
	}

	if err != nil {
		t.Fatal(err)
	}
}

// writeCheckpoint writes the pod's checkpoint.
func (f *foreignNode) writeCheckpoint(t *testing.T, p *foreignPod) {
	t.Helper()
	root := p.root
	if root != f.newRoot {
		root = f.hostPath(root)
	}

	p.checkpoint = filepath.Join(root, "sandbox", p.sandbox)
	m := p.config.Metadata
	data := fmt.Sprintf(`{"port_mappings":[{"protocol":"tcp","container_port":8080,"host_port":%d,"host_ip":""}]}`,
		p.port)
	if strings.HasPrefix(string(f.inspect(t, p.sandbox).HostConfig.NetworkMode), "host") {
		data = `{"host_network":true}`
	}

	text := fmt.Sprintf(`{"version":"v1","name":%q,"namespace":%q,"data":%s,"checksum":1234567}`, m.Name, m.Namespace,
		data)
	if err := os.MkdirAll(filepath.Dir(p.checkpoint), 0o755); err != nil {
		t.Fatal(err)
	}

	if err := os.WriteFile(p.checkpoint, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// held returns the remaining network state of a pod, or "" for none: leases, rules, cache, pinned
// namespaces, the checkpoint.
func (f *foreignNode) held(t *testing.T, p *foreignPod) string {
	t.Helper()
	var held []string
	for _, dir := range []string{
		f.hostPath("/var/lib/cni/networks/*"),
		f.hostPath("/var/lib/cni/cache/results"),
		f.hostPath("/var/lib/cni/cache/pending"),
		f.pins(),
		filepath.Dir(p.checkpoint),
	} {
		files, err := filepath.Glob(filepath.Join(dir, "*"))
		if err != nil {
			t.Fatal(err)
		}

		for _, file := range files {
			if b, _ := os.ReadFile(file); strings.Contains(filepath.Base(file)+string(b), p.sandbox) {
				held = append(held, file)
			}
		}
	}

	if rules := f.run(t, "iptables-save", "-t", "nat"); strings.Contains(rules, fmt.Sprintf("dport %d ", p.port)) {
		held = append(held, fmt.Sprintf("rules of host port %d", p.port))
	}

	return strings.Join(held, ", ")
}

// pins returns the directory of our pinned network namespaces, also before the first start of our
// daemon.
func (f *foreignNode) pins() string { return filepath.Join(f.eng.Dir, "run/netns") }
