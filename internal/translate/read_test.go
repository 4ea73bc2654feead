package translate

import (
	"encoding/json"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/system"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"pgregory.net/rapid"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/validate"
)

func TestNamesRoundTrip(t *testing.T) {
	part := rapid.StringMatching(`[a-zA-Z0-9][a-zA-Z0-9.-]{0,30}`)
	rapid.Check(t, func(t *rapid.T) {
		s := &runtimeapi.PodSandboxMetadata{
			Name:      part.Draw(t, "name"),
			Namespace: part.Draw(t, "namespace"),
			Uid:       part.Draw(t, "uid"),
			Attempt:   rapid.Uint32().Draw(t, "attempt"),
		}

		got, err := parseName("/" + SandboxName(s))
		if want := (name{"POD", s.Name, s.Namespace, s.Uid, s.Attempt}); err != nil || got != want {
			t.Fatalf("%+v, %v, want %+v", got, err, want)
		}

		c := &runtimeapi.ContainerMetadata{Name: part.Draw(t, "container"), Attempt: rapid.Uint32().Draw(t, "attempt")}
		got, err = parseName(ContainerName(c, s) + "_deadbeef") // the seventh part of old shims
		if want := (name{c.Name, s.Name, s.Namespace, s.Uid, c.Attempt}); err != nil || got != want {
			t.Fatalf("%+v, %v, want %+v", got, err, want)
		}
	})
}

func TestForeignNames(t *testing.T) {
	for _, bad := range []string{"", "/web", "/k8s_POD_a_b_c", "/k8s_POD_a_b_c_x", "/k8s_a_b_c_d_1_e_f",
		"/x8s_a_b_c_d_1"} {
		if n, err := parseName(bad); err == nil {
			t.Errorf("%q is %+v", bad, n)
		}
	}
}

// TestRecordRoundTrip writes hostile and reserved keys and reads them back from the record.
func TestRecordRoundTrip(t *testing.T) {
	key := rapid.OneOf(rapid.StringMatching(`[a-z./-]{1,20}`), rapid.SampledFrom([]string{
		labelType, labelSandboxID, labelLogPath, labelName, labelRecord, "annotation.x", "io.cri-dockerd.x",
		"io.kubernetes.pod.name",
	}))

	rapid.Check(t, func(t *rapid.T) {
		want := &record{
			Name:        "k8s_POD_a_b_c_0",
			Labels:      rapid.MapOfN(key, rapid.String(), 1, 5).Draw(t, "labels"),
			Annotations: rapid.MapOfN(key, rapid.String(), 1, 5).Draw(t, "annotations"),
			Sandbox:     &sandboxRecord{Pid: "POD", OwnNetNS: rapid.Bool().Draw(t, "netns")},
		}

		labels, err := want.write(map[string]string{labelType: typeSandbox, labelName: model.PauseName})
		if err != nil {
			t.Fatal(err)
		}

		got, err := parseRecord(labels, want.Name)
		if err != nil {
			t.Fatal(err)
		}

		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatal(diff)
		}
		if labels[labelType] != typeSandbox || labels[labelName] != model.PauseName {
			t.Fatalf("a CRI label replaced a fact: %v", labels)
		}
	})
}

// testID is a container's ID, testSandbox that of its sandbox.
const (
	testID      = "beefbeefbeefbeefbeefbeefbeefbeefbeefbeefbeefbeefbeefbeefbeefbeef"
	testSandbox = "abcdefabcdefabcdefabcdefabcdefabcdefabcdefabcdefabcdefabcdefabcd"
	testImage   = "sha256:cafecafecafecafecafecafecafecafecafecafecafecafecafecafecafecafe"
)

// inspect is what Docker answers of an older shim's container in a state.
func inspect(kind string, s container.State) container.InspectResponse {
	return container.InspectResponse{
		ID:      testID,
		Name:    "/k8s_main_web_default_u_3",
		Created: "2026-01-02T03:04:05.000000006Z",
		State:   &s,
		Image:   testImage,
		Config: &container.Config{
			Image:  "web:1",
			Labels: map[string]string{labelType: kind, labelSandboxID: testSandbox},
		},
		HostConfig: &container.HostConfig{},
	}
}

// read is Read of a container whose image brings no labels.
func read(t testing.TB, in container.InspectResponse) model.Object {
	t.Helper()
	o, err := Read(in, model.ImageLabels{})
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func TestReadState(t *testing.T) {
	const begin, end, never = "2026-01-02T03:04:06Z", "2026-01-02T03:04:07Z", "0001-01-01T00:00:00Z"
	created := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	for name, c := range map[string]struct {
		in   container.State
		want model.Container
	}{
		"created": {container.State{
			Status:     "created",
			StartedAt:  never,
			FinishedAt: never,
		}, model.Container{}},
		"running": {container.State{
			Status:     "running",
			Running:    true,
			Pid:        7,
			StartedAt:  begin,
			FinishedAt: never,
		}, model.Container{State: 1, Pid: 7, StartedAt: readTime(begin)}},
		"paused": {container.State{
			Status:    "paused",
			Running:   true,
			Paused:    true,
			Pid:       7,
			StartedAt: begin,
		}, model.Container{State: 1, Pid: 7, StartedAt: readTime(begin)}},
		"completed": {container.State{
			Status:     "exited",
			StartedAt:  begin,
			FinishedAt: end,
		}, model.Container{State: 2, Reason: "Completed", StartedAt: readTime(begin), FinishedAt: readTime(end)}},
		"failed": {container.State{
			Status:     "exited",
			ExitCode:   3,
			StartedAt:  begin,
			FinishedAt: end,
		}, model.Container{State: 2, Reason: "Error", ExitCode: 3, StartedAt: readTime(begin), FinishedAt: readTime(end)}},
		"oom": {container.State{
			Status:     "exited",
			ExitCode:   137,
			OOMKilled:  true,
			StartedAt:  begin,
			FinishedAt: end,
		}, model.Container{
			State:      2,
			Reason:     "OOMKilled",
			ExitCode:   137,
			StartedAt:  readTime(begin),
			FinishedAt: readTime(end),
		}},
		"start failed": {container.State{
			Status:     "created",
			ExitCode:   127,
			Error:      "no such file",
			StartedAt:  never,
			FinishedAt: never,
		}, model.Container{
			State:      2,
			Reason:     "ContainerCannotRun",
			ExitCode:   127,
			Message:    "no such file",
			FinishedAt: created,
		}},
		"start failed with 0": {container.State{Status: "created", Error: "no such file"}, model.Container{
			State:      2,
			Reason:     "ContainerCannotRun",
			ExitCode:   128,
			Message:    "no such file",
			FinishedAt: created,
		}},
		"an error of the engine": {container.State{
			Status:     "exited",
			Error:      "no such file",
			StartedAt:  begin,
			FinishedAt: end,
		}, model.Container{
			State:      2,
			Reason:     "ContainerCannotRun",
			ExitCode:   128,
			Message:    "no such file",
			StartedAt:  readTime(begin),
			FinishedAt: readTime(end),
		}},
		"ended before it began": {container.State{
			Status:     "exited",
			StartedAt:  end,
			FinishedAt: begin,
		}, model.Container{State: 2, Reason: "Completed", StartedAt: readTime(end), FinishedAt: readTime(end)}},
		"dead": {container.State{
			Status:     "dead",
			Dead:       true,
			ExitCode:   1,
			StartedAt:  begin,
			FinishedAt: end,
		}, model.Container{State: 2, Reason: "Error", ExitCode: 1, StartedAt: readTime(begin), FinishedAt: readTime(end)}},
	} {
		got := read(t, inspect(typeContainer, c.in)).Container
		if got == nil {
			t.Errorf("%s: not a container", name)
			continue
		}

		w := c.want
		if got.State != w.State || got.Reason != w.Reason || got.ExitCode != w.ExitCode || got.Message != w.Message ||
			got.Pid != w.Pid ||
			!got.CreatedAt.Equal(created) || !got.StartedAt.Equal(w.StartedAt) || !got.FinishedAt.Equal(w.FinishedAt) {
			t.Errorf("%s: got %+v, want %+v", name, got, w)
		}

		s := got.Status()
		if w.State == runtimeapi.ContainerState_CONTAINER_EXITED && (s.StartedAt == 0 || s.FinishedAt < s.StartedAt) {
			t.Errorf("%s: the times of an ended container: %v", name, s)
		}

		if w.StartedAt.IsZero() && s.StartedAt != 0 && w.State != runtimeapi.ContainerState_CONTAINER_EXITED ||
			w.FinishedAt.IsZero() && s.FinishedAt != 0 {
			t.Errorf("%s: an unset time is not 0: %v", name, s)
		}
	}
}

// TestReadNeverPanics reads answers with any part missing.
func TestReadNeverPanics(t *testing.T) {
	full := inspect(typeContainer, container.State{})
	for _, in := range []container.InspectResponse{
		{}, {Name: full.Name}, {Name: full.Name, Config: full.Config}, {
			Name:   full.Name,
			Config: full.Config,
			State:  full.State,
		},
		{Name: full.Name, Config: &container.Config{Labels: map[string]string{labelType: typeSandbox}}},
	} {
		_, _ = Read(in, model.ImageLabels{})
	}

	foreign := inspect(typeContainer, container.State{})
	foreign.Config.Labels = nil
	if o := read(t, foreign); o.Container != nil || o.Sandbox != nil {
		t.Errorf("a foreign container is %+v", o)
	}
}

// TestOldShimsSandbox reads a pod of the shims before: no label of ours.
func TestOldShimsSandbox(t *testing.T) {
	in := inspect(typeSandbox, container.State{Status: "running", Running: true, Pid: 9})
	in.Name = "/k8s_POD_web_default_u_0"
	in.Config.Labels = map[string]string{
		labelType:               typeSandbox,
		labelName:               model.PauseName,
		"app":                   "web",
		"annotation.a":          "b",
		"io.kubernetes.pod.uid": "u",
	}

	in.HostConfig.NetworkMode = "none"
	s := read(t, in).Sandbox
	if s == nil || s.Metadata.Name != "web" || s.Metadata.Uid != "u" || !s.Running || s.HostNetwork() ||
		s.Namespaces.Pid != runtimeapi.NamespaceMode_CONTAINER {
		t.Fatalf("%+v", s)
	}

	if diff := cmp.Diff(map[string]string{"app": "web", "io.kubernetes.pod.uid": "u"}, s.Labels); diff != "" {
		t.Error(diff)
	}

	st := s.Status([]netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")})
	if st.Network.Ip != "10.0.0.1" || len(st.Network.AdditionalIps) != 1 ||
		st.State != runtimeapi.PodSandboxState_SANDBOX_READY {
		t.Errorf("status: %v", st)
	}
}

func TestSignals(t *testing.T) {
	for n := range runtimeapi.Signal_name {
		s := runtimeapi.Signal(n)
		if s == runtimeapi.Signal_SIGNAL_RUNTIME_DEFAULT {
			continue
		}
		if got := readSignal(signalName(s)); got != s {
			t.Errorf("%v became %q and %v", s, signalName(s), got)
		}
	}

	for in, want := range map[string]runtimeapi.Signal{
		"": runtimeapi.Signal_SIGNAL_SIGTERM, "quit": runtimeapi.Signal_SIGNAL_SIGQUIT,
		"SIGRTMIN+3": runtimeapi.Signal_SIGNAL_SIGRTMINPLUS3, "nonsense": 0,
	} {
		if got := readSignal(in); got != want {
			t.Errorf("%q is %v, want %v", in, got, want)
		}
	}
}

func TestImages(t *testing.T) {
	const id = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	i, err := ReadImage(image.Summary{
		ID:          id,
		RepoTags:    []string{"web:1", "<none>:<none>"},
		RepoDigests: []string{"<none>@<none>"},
		Size:        5,
	}, image.InspectResponse{})
	if err != nil {
		t.Fatal(err)
	}

	i.User = "1000:7"
	c := i.CRI()
	if len(c.RepoTags) != 1 || len(c.RepoDigests) != 0 || c.Uid.GetValue() != 1000 || c.Size != 5 || c.Pinned {
		t.Errorf("%v", c)
	}

	for ref, want := range map[string]bool{
		"web:1":                   true,
		"docker.io/library/web:1": true,
		"web":                     false,
		"web:2":                   false,
	} {
		if got := i.HasName(model.FamiliarName(ref)); got != want {
			t.Errorf("%s: %v", ref, got)
		}
	}

	for ref, want := range map[string]bool{
		id:                    true,
		"0123456789ab":        true,
		"sha256:0123456789ab": true,
		"0123":                false,
		"web":                 false,
	} {
		if got := i.HasID(ref); got != want {
			t.Errorf("%s: %v", ref, got)
		}
	}
}

func TestReadHost(t *testing.T) {
	in := system.Info{
		ServerVersion:   "20.10.24",
		CgroupDriver:    "systemd",
		SecurityOptions: []string{"name=seccomp,profile=default", "apparmor"},
		Runtimes:        map[string]system.RuntimeWithStatus{"runc": {}, "crun": {}},
	}

	h := ReadHost(in, "1.41", -5)
	if !h.Has("seccomp") || !h.Has("apparmor") || h.Has("selinux") || h.CgroupVersion != "1" ||
		h.Runtimes[0] != "crun" || h.ClampOOMScore(-998) != -5 || h.ClampOOMScore(7) != 7 {
		t.Errorf("%+v", h)
	}

	if h.AtLeast("1.44") || !h.AtLeast("1.41") || !h.AtLeast("1.9") {
		t.Error("API versions are not compared by their numbers")
	}
}

// FuzzTranslate makes sure that whatever passes Validate is translated or refused, but never
// panics, and that what Docker is told can be read back.
func FuzzTranslate(f *testing.F) {
	r := &runtimeapi.CreateContainerRequest{
		PodSandboxId: "beef",
		Config: &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: "main"},
			Image:    &runtimeapi.ImageSpec{Image: "web:1"},
			Mounts:   []*runtimeapi.Mount{{HostPath: "/a", ContainerPath: "/b"}},
		},
		SandboxConfig: &runtimeapi.PodSandboxConfig{Metadata: &runtimeapi.PodSandboxMetadata{
			Name:      "a",
			Namespace: "b",
			Uid:       "c",
		}},
	}

	b, err := proto.Marshal(r)
	if err != nil {
		f.Fatal(err)
	}

	f.Add(b, true)
	f.Add(b[:len(b)/2], false)
	f.Fuzz(func(t *testing.T, b []byte, old bool) {
		host := hosts["29"]
		if old {
			host = hosts["20.10"]
		}

		r := &runtimeapi.CreateContainerRequest{}
		if proto.Unmarshal(b, r) != nil || validate.Request(r) != nil {
			return
		}

		pod := &runtimeapi.RunPodSandboxRequest{Config: r.SandboxConfig}
		if validate.Request(pod) != nil {
			return
		}

		if c, err := NewSandbox(r.SandboxConfig, SandboxOptions{
			Host:        host,
			Image:       model.PauseImage{Source: "p", Name: "p"},
			NetworkMode: "bridge",
		}); err == nil {
			o, err := Read(container.InspectResponse{
				ID:         testID,
				Name:       "/" + c.Name,
				Config:     c.Config,
				HostConfig: c.Host,
			}, model.ImageLabels{})
			if err != nil || o.Sandbox == nil || !proto.Equal(o.Sandbox.Metadata, r.SandboxConfig.Metadata) {
				t.Fatalf("%s read back is %+v, %v", c.Name, o.Sandbox, err)
			}
		} else if !errdefs.IsInvalidArgument(err) {
			t.Fatal(err)
		}

		sb := &model.Sandbox{ID: testSandbox, Metadata: r.SandboxConfig.Metadata}
		image := &model.Image{ID: "i", Entrypoint: true}
		if validate.Container(r.Config, sb, image, host) != nil {
			return
		}

		c, err := NewContainer(r.Config, r.SandboxConfig, ContainerOptions{Host: host, Sandbox: sb, Image: image})
		if err != nil {
			if !errdefs.IsInvalidArgument(err) && !errdefs.IsFailedPrecondition(err) {
				t.Fatal(err)
			}
			return
		}

		if _, err := json.Marshal(c); err != nil {
			t.Fatal(err)
		}

		o, err := Read(container.InspectResponse{
			ID:         testID,
			Name:       "/" + c.Name,
			Config:     c.Config,
			HostConfig: c.Host,
		}, model.ImageLabels{})
		if err != nil || o.Container == nil || !maps.Equal(o.Container.Labels, r.Config.GetLabels()) {
			t.Fatalf("%s read back is %+v, %v", c.Name, o.Container, err)
		}
	})
}

// TestReadAnOlderShimsSandbox reads one whose metadata stands only in its name, with the seventh
// part of a conflict.
func TestReadAnOlderShimsSandbox(t *testing.T) {
	in := inspect(typeSandbox, container.State{Status: "running", Running: true, Pid: 7})
	in.Name = "/k8s_POD_web_default_u_3_deadbeef"
	in.Config.Labels = map[string]string{
		labelType:                typeSandbox,
		labelName:                model.PauseName,
		"io.kubernetes.pod.name": "web",
		"annotation.a":           "b",
	}

	in.HostConfig.NetworkMode = "bridge"
	in.HostConfig.PortBindings = network.PortMap{
		network.MustParsePort("80/tcp"): {{HostPort: "8080"}},
		network.MustParsePort("53/udp"): {{HostPort: "53", HostIP: netip.MustParseAddr("192.0.2.1")}},
	}

	s := read(t, in).Sandbox
	if s == nil || !s.Foreign || !s.EngineNetwork() || s.HostNetwork() {
		t.Fatalf("%+v", s)
	}

	want := &runtimeapi.PodSandboxMetadata{Name: "web", Namespace: "default", Uid: "u", Attempt: 3}
	if !proto.Equal(s.Metadata, want) || !maps.Equal(s.Labels, map[string]string{"io.kubernetes.pod.name": "web"}) ||
		!maps.Equal(s.Annotations, map[string]string{"a": "b"}) {
		t.Errorf("%v, %v, %v", s.Metadata, s.Labels, s.Annotations)
	}

	wantPorts := []*runtimeapi.PortMapping{{
		Protocol:      runtimeapi.Protocol_UDP,
		ContainerPort: 53,
		HostPort:      53,
		HostIp:        "192.0.2.1",
	}, {ContainerPort: 80, HostPort: 8080}}
	if diff := cmp.Diff(wantPorts, s.EnginePorts, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}

	for mode, engines := range map[container.NetworkMode]bool{
		"none":    false,
		"host":    false,
		"default": true,
		"bridge":  true,
		"mine":    true,
		"":        false,
	} {
		in.HostConfig.NetworkMode = mode
		if got := read(t, in).Sandbox.EngineNetwork(); got != engines {
			t.Errorf("%q is the engine's: %v", mode, got)
		}
	}

	own := &record{Name: "k8s_POD_web_default_u_3_deadbeef", Sandbox: &sandboxRecord{Pid: "POD", OwnNetNS: true}}
	labels, err := own.write(map[string]string{labelType: typeSandbox})
	if err != nil {
		t.Fatal(err)
	}

	in.Config.Labels, in.HostConfig.NetworkMode = labels, "host"
	if s := read(t, in).Sandbox; s.Foreign || s.EngineNetwork() || s.HostNetwork() {
		t.Errorf("one of ours: %+v", s)
	}
}

func TestMisfit(t *testing.T) {
	const good = "/k8s_main_web_default_u_3"

	for _, c := range []struct {
		name, kind string
		want       string // a part of it; "" for nothing
	}{
		{good, typeContainer, ""}, {good, typeSandbox, ""}, {"/web", "", ""}, {good, "", "not the label"},
		{"/renamed", typeContainer, "is not of the form"},
		{good, "volume", `"volume"`}, {"/k8s_main_web_default_u_x", typeSandbox, "attempt"},
	} {
		labels := map[string]string{}
		if c.kind != "" {
			labels[labelType] = c.kind
		}
		if got := Misfit(c.name, labels); (got == "") != (c.want == "") || !strings.Contains(got, c.want) {
			t.Errorf("%s, %s: %q", c.name, c.kind, got)
		}
	}
}

// TestImageNames: digests stand among the digests, wherever the engine lists them.
func TestImageNames(t *testing.T) {
	one, two := "app@sha256:"+strings.Repeat("1", 64), "app@sha256:"+strings.Repeat("2", 64)
	tags, digests := imageNames([]string{"app:1", one, "<none>:<none>", two}, []string{one, "<none>@<none>"})
	if !slices.Equal(tags, []string{"app:1"}) || !slices.Equal(digests, []string{one, two}) {
		t.Errorf("tags %q, digests %q", tags, digests)
	}
}
