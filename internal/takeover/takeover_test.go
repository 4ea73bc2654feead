package takeover

import (
	"bytes"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/checkpoint"
	"cri-dockerd/internal/engine"
	"cri-dockerd/internal/exit"
	"cri-dockerd/internal/logs/driver"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/podnet"
	"cri-dockerd/internal/spec"
)

const (
	running = runtimeapi.ContainerState_CONTAINER_RUNNING
	exited  = runtimeapi.ContainerState_CONTAINER_EXITED
)

// sandbox is a running one of an older shim, connected by CNI; edit changes it.
func sandbox(id, name string, edit ...func(*spec.Sandbox)) spec.Object {
	s := &spec.Sandbox{
		ID:          model.ContainerID(id),
		Metadata:    &runtimeapi.PodSandboxMetadata{Namespace: "default", Name: name, Uid: "u-" + name},
		Running:     true,
		Pid:         1,
		Foreign:     true,
		NetworkMode: "none",
		Namespaces:  &runtimeapi.NamespaceOption{},
	}

	for _, e := range edit {
		e(s)
	}

	return spec.Object{Sandbox: s}
}

// member is a running container with Docker's log behind a link; edit changes it.
func member(id, pod, name string, edit ...func(*spec.Container)) spec.Object {
	c := &spec.Container{
		ID:            model.ContainerID(id),
		Name:          "k8s_" + name,
		SandboxID:     model.ContainerID(pod),
		Metadata:      &runtimeapi.ContainerMetadata{Name: name},
		State:         running,
		LogPath:       "/var/log/pods/" + id,
		EngineLogPath: "/docker/" + id,
		LogDriver:     "json-file",
	}

	for _, e := range edit {
		e(c)
	}

	return spec.Object{Container: c}
}

func ours(s *spec.Sandbox)     { s.Foreign = false }
func ownNetNS(s *spec.Sandbox) { s.Foreign, s.OwnNetNS, s.NetworkMode = false, true, "host" }
func host(s *spec.Sandbox) {
	s.NetworkMode, s.Namespaces.Network = "host", runtimeapi.NamespaceMode_NODE
}
func bridge(s *spec.Sandbox) {
	s.NetworkMode = "bridge"
	s.EngineIPs = []netip.Addr{netip.MustParseAddr("172.17.0.2")}
}
func dead(s *spec.Sandbox)       { s.Running, s.Pid = false, 0 }
func ended(c *spec.Container)    { c.State = exited }
func criLog(c *spec.Container)   { c.LogDriver, c.EngineLogPath = driver.Name, "" }
func journald(c *spec.Container) { c.LogDriver, c.EngineLogPath = "journald", "" }

var (
	port = []*runtimeapi.PortMapping{{HostPort: 8080, ContainerPort: 80}}
	web  = podnet.Connection{
		Network:   "cbr0",
		Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.2")},
		MapsPorts: true,
		Ports:     port,
	}
	empty = podnet.Connection{Network: "kubenet", Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.3")}}
)

// node is a survey with objects whose logs are linked.
func node(objects ...spec.Object) *survey {
	s := &survey{
		host:    spec.Host{EngineVersion: "20.10.24"},
		plugin:  "cni",
		objects: objects,
		cache:   map[string]podnet.Connection{},
		found:   map[string][]netip.Addr{},
		notes:   map[string]note{},
		links:   map[string]string{},
		pinned:  map[string]bool{},
	}

	for _, o := range objects {
		if c := o.Container; c != nil {
			s.links[string(c.ID)] = c.EngineLogPath
		}
	}

	return s
}

func TestReport(t *testing.T) {
	s := node(sandbox("aa", "web"), member("a1", "aa", "main"), member("a2", "aa", "init", ended),
		sandbox("bb", "own", ownNetNS), member("b1", "bb", "main", criLog),
		sandbox("cc", "net", host), sandbox("dd", "solo", bridge), sandbox("ee", "lost"))
	s.cache["aa"], s.cache["bb"] = web, web
	s.found["ee"] = []netip.Addr{netip.MustParseAddr("10.0.0.9")}
	s.notes["aa"] = note{file: "/var/lib/dockershim/sandbox/aa"}
	s.notes["cc"] = note{file: "/var/lib/cri-dockerd/sandbox/cc"}
	s.notes["ff"] = note{
		file:       "/var/lib/dockershim/sandbox/ff",
		Checkpoint: checkpoint.Checkpoint{Name: "gone", Namespace: "default"},
	}

	s.objects = append(s.objects, member("g1", "gg", "orphan"))
	s.links["g1"] = "/docker/g1"
	s.misfits = []engine.Misfit{{ID: "99", Name: "renamed", Reason: "its name is odd"}}
	r := s.report()
	var out bytes.Buffer
	r.text(&out)
	const want = `Docker Engine 20.10.24, --network-plugin=cni: 4 pods of older shims and 1 of this release.
The daemon adopts them when it starts, as they are; nothing is restarted.

POD           ATTEMPT  MADE BY            STATE  NETWORK              ADDRESS     HOST PORTS    CONTAINERS          LOGS
default/lost  0        an older shim      ready  not in the cache     10.0.0.9    -             -                   -
default/net   0        older cri-dockerd  ready  host                 -           -             -                   -
default/own   0        this release       ready  cbr0, own namespace  10.0.0.2    8080->80/tcp  1 running           CRI file
default/solo  0        an older shim      ready  Docker's bridge      172.17.0.2  -             -                   -
default/web   0        dockershim         ready  cbr0                 10.0.0.2    8080->80/tcp  1 running,1 exited  json-file, linked

By hand, before the daemon starts:
  container renamed: its name is odd; nobody manages it
    -> docker rm -f 99

Good to know:
  default/lost: the CNI cache does not say how it was connected
    -> its address is read from its network namespace; it is released with the configuration of that day, so keep the network add-on
  default/solo: it is on Docker's own bridge, and pods of --network-plugin=cni are not
    -> it stays there until it is made anew
  default/gone: /var/lib/dockershim/sandbox/ff notes a sandbox whose container is gone
    -> its network is released at the start, and the note removed
  container k8s_orphan: its sandbox is gone
    -> the kubelet removes it
  1 pod of this release: their network namespaces are our own, which an older shim takes for the host's
    -> before a way back they need a drain; takeover --hand-back --dry-run lists them
`

	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Error(diff)
	}
	if r.byHand() != 1 {
		t.Errorf("%d by hand", r.byHand())
	}
}

// TestOddThings has one odd thing each; the last word is whether somebody must do something.
func TestOddThings(t *testing.T) {
	with := func(s *survey, edit func(*survey)) *survey { edit(s); return s }
	for name, c := range map[string]struct {
		node   *survey
		says   string
		byHand bool
	}{
		"nothing": {with(node(sandbox("aa", "web"), member("a1", "aa", "main")), func(s *survey) {
			s.cache["aa"] = web
		}), "", false},
		"host ports": {with(node(sandbox("aa", "web")), func(s *survey) {
			s.cache["aa"] = empty
			s.notes["aa"] = note{file: "f", Checkpoint: checkpoint.Checkpoint{Ports: port}}
		}), "8080->80/tcp", true},
		"no plugin": {with(node(sandbox("aa", "web")), func(s *survey) {
			s.plugin = ""
			s.cache["aa"] = web
		}), "empty --network-plugin", true},
		"broken cache": {with(node(sandbox("aa", "web")), func(s *survey) {
			s.cache["aa"] = podnet.Connection{Problem: "broken", Addresses: web.Addresses}
		}), "cannot be released", true},
		"broken note": {with(node(sandbox("aa", "web")), func(s *survey) {
			s.cache["aa"] = web
			s.notes["aa"] = note{file: "f", problem: "broken"}
		}), "broken", false},
		"no address": {with(node(sandbox("aa", "web", ours)), func(s *survey) {}), "no address", false},
		"dead pause": {node(sandbox("aa", "web", dead), member("a1", "aa", "main")), "dead", false},
		"dead alone": {node(sandbox("aa", "web", dead), member("a1", "aa", "main", ended)), "", false},
		"no link": {with(node(sandbox("aa", "web", host), member("a1", "aa", "main")), func(s *survey) {
			s.links["a1"] = ""
		}), "ln -sfn /docker/a1 /var/log/pods/a1", true},
		"no link, ended": {with(node(sandbox("aa", "web", host), member("a1", "aa", "main", ended)), func(s *survey) {
			s.links["a1"] = ""
		}), "", false},
		"journald": {node(sandbox("aa", "web", host), member("a1", "aa", "main", journald)), "keeps no file", false},
		"bridge":   {with(node(sandbox("aa", "web", bridge)), func(s *survey) { s.plugin = "" }), "", false},
	} {
		t.Run(name, func(t *testing.T) {
			r := c.node.report()
			if c.says == "" {
				if len(r.Findings) != 0 {
					t.Errorf("%+v", r.Findings)
				}
				return
			}

			if len(r.Findings) != 1 || !strings.Contains(r.Findings[0].Detail+r.Findings[0].Fix.String(), c.says) ||
				r.Findings[0].ByHand != c.byHand {
				t.Errorf("%+v", r.Findings)
			}
		})
	}
}

// unpinned records what is unpinned.
type unpinned []model.ContainerID

func (u *unpinned) Unpin(id model.ContainerID) error {
	*u = append(*u, id)
	if id == "bad" {
		return errors.New("busy")
	}
	return nil
}

func TestHandBack(t *testing.T) {
	const zeros = "00000000000000000000000000000000000000000000000000000000000000"
	const a0, a1, a2, a3, a4, a5, a6, a7 = "a0" + zeros, "a1" + zeros, "a2" + zeros, "a3" + zeros, "a4" + zeros, "a5" +
		zeros, "a6" + zeros, "a7" + zeros
	image := func(c *spec.Container) { c.ImageVolumes = []spec.ImageVolume{{ImageID: "i"}} }
	s := node(sandbox(a0, "old"), sandbox(a1, "web", ours), member("c1", a1, "main"), sandbox(a2, "proxy", host, ours),
		sandbox(a3, "own", ownNetNS),
		sandbox(a4, "log", ours), member("c4", a4, "main", criLog), sandbox(a5, "image", ours),
		member("c5", a5, "main", image), sandbox(a6, "own-dead", ownNetNS, dead),
		sandbox(a7, "own-held", ownNetNS, dead))

	s.cache[a1], s.cache[a7] = web, web
	s.notes[a0] = note{file: "/var/lib/cri-dockerd/sandbox/a0"}
	s.pinned = map[string]bool{a0: true, a1: true, a3: true}
	h := s.handBack()
	root := t.TempDir()
	files, pins := checkpoint.New(root), &unpinned{}
	if err := h.do(files, pins); err != nil {
		t.Fatal(err)
	}

	if got := files.List(); !cmp.Equal(got, []model.ContainerID{a1, a2}) {
		t.Errorf("notes: %v", got)
	}

	if c, err := files.Read(a1); err != nil || len(c.Ports) != 1 || c.HostNetwork || c.Name != "web" ||
		c.Namespace != "default" {
		t.Errorf("%+v, %v", c, err)
	}

	if c, err := files.Read(a2); err != nil || !c.HostNetwork {
		t.Errorf("%+v, %v", c, err)
	}

	if !cmp.Equal([]model.ContainerID(*pins), []model.ContainerID{a0, a1}) {
		t.Errorf("unpinned %v", *pins)
	}

	var out bytes.Buffer
	h.text(&out, true)
	const want = `To be noted for an older shim: 2 pods. Noted already by the shim that made them: 1.
  default/proxy, host ports -
  default/web, host ports 8080->80/tcp

Drain before the older shim starts: 4 pods. It would make them anew, and their addresses would stay taken.
  default/image: container main has an image volume, which only this daemon unmounts
  default/log: container main writes its log through the log-driver process of this release, and stands still without it
  default/own: its network namespace is our own; the older shim takes it for the host's and never releases its address
  default/own-held: its network namespace is our own; the older shim takes it for the host's and never releases its address
`

	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Error(diff)
	}
	if err := os.RemoveAll(root); err != nil {
		t.Fatal(err)
	}

	h.unpin = []string{"bad"}
	if err := os.WriteFile(root, nil, 0o600); err != nil {
		t.Fatal(err)
	}

	if err := h.do(files, pins); err == nil || !strings.Contains(err.Error(), "busy") ||
		!strings.Contains(err.Error(), filepath.Base(root)) {
		t.Errorf("%v", err)
	}
}

func TestAnswersAndExitCode(t *testing.T) {
	r := node(sandbox("aa", "web", host)).report()
	var out bytes.Buffer
	if err := show(&out, options{output: "json"}, r, nil, 0, ""); err != nil ||
		!strings.Contains(out.String(), `"madeBy": "an older shim"`) ||
		!strings.Contains(out.String(), `"findings": []`) {
		t.Errorf("%s, %v", &out, err)
	}

	err := show(&out, options{output: "json"}, r, nil, 2, "today")
	if exit.CodeOf(err) != 3 || !strings.Contains(err.Error(), "2 things") {
		t.Errorf("%v", err)
	}
}
