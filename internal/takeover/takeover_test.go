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
)

const (
	running = runtimeapi.ContainerState_CONTAINER_RUNNING
	exited  = runtimeapi.ContainerState_CONTAINER_EXITED
)

// sandbox returns a running sandbox of an older shim, connected by CNI and changed by edit.
func sandbox(id, name string, edit ...func(*model.Sandbox)) model.Object {
	s := &model.Sandbox{
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

	return model.Object{Sandbox: s}
}

// member returns a running container with a link to Docker's log, changed by edit.
func member(id, pod, name string, edit ...func(*model.Container)) model.Object {
	c := &model.Container{
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

	return model.Object{Container: c}
}

func ours(s *model.Sandbox)     { s.Foreign = false }
func ownNetNS(s *model.Sandbox) { s.Foreign, s.OwnNetNS, s.NetworkMode = false, true, "host" }
func host(s *model.Sandbox) {
	s.NetworkMode, s.Namespaces.Network = "host", runtimeapi.NamespaceMode_NODE
}
func bridge(s *model.Sandbox) {
	s.NetworkMode = "bridge"
	s.EngineIPs = []netip.Addr{netip.MustParseAddr("172.17.0.2")}
}
func dead(s *model.Sandbox)       { s.Running, s.Pid = false, 0 }
func ended(c *model.Container)    { c.State = exited }
func criLog(c *model.Container)   { c.LogDriver, c.EngineLogPath = driver.Name, "" }
func journald(c *model.Container) { c.LogDriver, c.EngineLogPath = "journald", "" }

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

// node returns a survey of objects with linked logs.
func node(objects ...model.Object) *survey {
	s := &survey{
		host:        model.Host{EngineVersion: "20.10.24"},
		plugin:      "cni",
		objects:     objects,
		cache:       map[string]podnet.Connection{},
		nsAddresses: map[string][]netip.Addr{},
		checkpoints: map[string]checkpointFile{},
		logLinks:    map[string]string{},
		pinned:      map[string]bool{},
	}

	for _, o := range objects {
		if c := o.Container; c != nil {
			s.logLinks[string(c.ID)] = c.EngineLogPath
		}
	}

	return s
}

func TestReport(t *testing.T) {
	s := node(sandbox("aa", "web"), member("a1", "aa", "main"), member("a2", "aa", "init", ended),
		sandbox("bb", "own", ownNetNS), member("b1", "bb", "main", criLog),
		sandbox("cc", "net", host), sandbox("dd", "solo", bridge), sandbox("ee", "lost"))
	s.cache["aa"], s.cache["bb"] = web, web
	s.nsAddresses["ee"] = []netip.Addr{netip.MustParseAddr("10.0.0.9")}
	s.checkpoints["aa"] = checkpointFile{file: "/var/lib/dockershim/sandbox/aa"}
	s.checkpoints["cc"] = checkpointFile{file: "/var/lib/cri-dockerd/sandbox/cc"}
	s.checkpoints["ff"] = checkpointFile{
		file:       "/var/lib/dockershim/sandbox/ff",
		Checkpoint: checkpoint.Checkpoint{Name: "gone", Namespace: "default"},
	}

	s.objects = append(s.objects, member("g1", "gg", "orphan"))
	s.logLinks["g1"] = "/docker/g1"
	s.misfits = []engine.Misfit{{ID: "99", Name: "renamed", Reason: "its name is invalid"}}
	r := s.report()
	var out bytes.Buffer
	r.text(&out)
	const want = `Docker Engine 20.10.24, --network-plugin=cni: 4 pods of older shims and 1 of this release.
The daemon adopts them at its next start without restarting containers.

POD           ATTEMPT  CREATED BY         STATE  NETWORK              ADDRESS     HOST PORTS    CONTAINERS          LOGS
default/lost  0        an older shim      ready  unknown              10.0.0.9    -             -                   -
default/net   0        older cri-dockerd  ready  host                 -           -             -                   -
default/own   0        this release       ready  cbr0, own namespace  10.0.0.2    8080->80/tcp  1 running           CRI file
default/solo  0        an older shim      ready  Docker's bridge      172.17.0.2  -             -                   -
default/web   0        dockershim         ready  cbr0                 10.0.0.2    8080->80/tcp  1 running,1 exited  json-file, linked

Actions required before the daemon starts:
  container renamed: its name is invalid; it is not managed by Kubernetes
    -> docker rm -f 99

Notes:
  default/lost: its connection is missing from the CNI cache
    -> its address is read from its network namespace; it will be released with the CNI configuration at that time, so keep the network add-on
  default/solo: it is on Docker's own bridge, unlike pods with --network-plugin=cni
    -> it stays there until it is recreated
  default/gone: /var/lib/dockershim/sandbox/ff is the checkpoint of a removed sandbox
    -> the daemon releases its network and removes the checkpoint at its start
  container k8s_orphan: its sandbox was removed
    -> the kubelet removes it
  1 pod of this release: their network namespaces were created by this daemon; an older shim treats them as the host network
    -> drain them before a hand-back; takeover --hand-back --dry-run lists them
`

	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Error(diff)
	}
	if r.manualActions() != 1 {
		t.Errorf("%d actions required", r.manualActions())
	}
}

// TestFindings has one finding per case. The last column is whether it requires an action of the
// operator.
func TestFindings(t *testing.T) {
	with := func(s *survey, edit func(*survey)) *survey { edit(s); return s }
	for name, c := range map[string]struct {
		node           *survey
		want           string
		actionRequired bool
	}{
		"nothing": {with(node(sandbox("aa", "web"), member("a1", "aa", "main")), func(s *survey) {
			s.cache["aa"] = web
		}), "", false},
		"host ports": {with(node(sandbox("aa", "web")), func(s *survey) {
			s.cache["aa"] = empty
			s.checkpoints["aa"] = checkpointFile{file: "f", Checkpoint: checkpoint.Checkpoint{Ports: port}}
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
			s.checkpoints["aa"] = checkpointFile{file: "f", problem: "broken"}
		}), "broken", false},
		"no address": {with(node(sandbox("aa", "web", ours)), func(s *survey) {}), "no address", false},
		"dead pause": {node(sandbox("aa", "web", dead), member("a1", "aa", "main")), "pause process has exited", false},
		"dead alone": {node(sandbox("aa", "web", dead), member("a1", "aa", "main", ended)), "", false},
		"no link": {with(node(sandbox("aa", "web", host), member("a1", "aa", "main")), func(s *survey) {
			s.logLinks["a1"] = ""
		}), "ln -sfn /docker/a1 /var/log/pods/a1", true},
		"no link, ended": {with(node(sandbox("aa", "web", host), member("a1", "aa", "main", ended)), func(s *survey) {
			s.logLinks["a1"] = ""
		}), "", false},
		"journald": {node(sandbox("aa", "web", host), member("a1", "aa", "main", journald)), "writes no file", false},
		"bridge":   {with(node(sandbox("aa", "web", bridge)), func(s *survey) { s.plugin = "" }), "", false},
	} {
		t.Run(name, func(t *testing.T) {
			r := c.node.report()
			if c.want == "" {
				if len(r.Findings) != 0 {
					t.Errorf("%+v", r.Findings)
				}
				return
			}

			if len(r.Findings) != 1 || !strings.Contains(r.Findings[0].Detail+r.Findings[0].Fix.String(), c.want) ||
				r.Findings[0].ActionRequired != c.actionRequired {
				t.Errorf("%+v", r.Findings)
			}
		})
	}
}

// unpinned records calls of Unpin.
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
	image := func(c *model.Container) { c.ImageVolumes = []model.ImageVolume{{ImageID: "i"}} }
	s := node(sandbox(a0, "old"), sandbox(a1, "web", ours), member("c1", a1, "main"), sandbox(a2, "proxy", host, ours),
		sandbox(a3, "own", ownNetNS),
		sandbox(a4, "log", ours), member("c4", a4, "main", criLog), sandbox(a5, "image", ours),
		member("c5", a5, "main", image), sandbox(a6, "own-dead", ownNetNS, dead),
		sandbox(a7, "own-held", ownNetNS, dead))

	s.cache[a1], s.cache[a7] = web, web
	s.checkpoints[a0] = checkpointFile{file: "/var/lib/cri-dockerd/sandbox/a0"}
	s.pinned = map[string]bool{a0: true, a1: true, a3: true}
	h := s.handBack()
	root := t.TempDir()
	files, pins := checkpoint.New(root), &unpinned{}
	if err := h.apply(files, pins); err != nil {
		t.Fatal(err)
	}

	if got := files.List(); !cmp.Equal(got, []model.ContainerID{a1, a2}) {
		t.Errorf("checkpoints: %v", got)
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
	const want = `Would write checkpoints for an older shim: 2 pods. Pods with an existing checkpoint: 1.
  default/proxy, host ports -
  default/web, host ports 8080->80/tcp

Drain before the older shim starts: 4 pods. Otherwise it recreates them without releasing their addresses.
  default/image: container main has an image volume; only this daemon unmounts it
  default/log: container main logs through the log-driver process of this release and blocks without it
  default/own: its network namespace was created by this daemon; an older shim treats it as the host network and never releases the address
  default/own-held: its network namespace was created by this daemon; an older shim treats it as the host network and never releases the address
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

	if err := h.apply(files, pins); err == nil || !strings.Contains(err.Error(), "busy") ||
		!strings.Contains(err.Error(), filepath.Base(root)) {
		t.Errorf("%v", err)
	}
}

func TestOutputAndExitCode(t *testing.T) {
	r := node(sandbox("aa", "web", host)).report()
	var out bytes.Buffer
	if err := writeResult(&out, options{output: "json"}, r, nil, 0, ""); err != nil ||
		!strings.Contains(out.String(), `"createdBy": "an older shim"`) ||
		!strings.Contains(out.String(), `"findings": []`) {
		t.Errorf("%s, %v", &out, err)
	}

	err := writeResult(&out, options{output: "json"}, r, nil, 2, "today")
	if exit.CodeOf(err) != 3 || !strings.Contains(err.Error(), "2 actions required by hand") {
		t.Errorf("%v", err)
	}
}
