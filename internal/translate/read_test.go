package translate

import (
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// IDs of a container, its sandbox and its image.
const (
	testID      = "beefbeefbeefbeefbeefbeefbeefbeefbeefbeefbeefbeefbeefbeefbeefbeef"
	testSandbox = "abcdefabcdefabcdefabcdefabcdefabcdefabcdefabcdefabcdefabcdefabcd"
	testImage   = "sha256:cafecafecafecafecafecafecafecafecafecafecafecafecafecafecafecafe"
)

// inspect returns Docker's inspect of an older shim's container.
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

// read reads a container of an image without labels.
func read(t testing.TB, in container.InspectResponse) model.Object {
	t.Helper()
	o, err := Read(in, model.ImageLabels{})
	if err != nil {
		t.Fatal(err)
	}
	return o
}

const (
	started  = "2026-01-02T03:04:06Z"
	finished = "2026-01-02T03:04:07Z"
	never    = "0001-01-01T00:00:00Z" // Docker's unset time
)

// created is the creation time in inspect.
var created = time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)

// stateCase is a state of Docker's and the expected record.
type stateCase struct {
	in   container.State
	want model.Container
}

// aliveStates are states before the exit.
func aliveStates() map[string]stateCase {
	running := model.Container{
		State:     runtimeapi.ContainerState_CONTAINER_RUNNING,
		Pid:       7,
		StartedAt: readTime(started),
	}

	return map[string]stateCase{
		"created": {
			container.State{Status: "created", StartedAt: never, FinishedAt: never},
			model.Container{},
		},
		"running": {
			container.State{Status: "running", Running: true, Pid: 7, StartedAt: started, FinishedAt: never},
			running,
		},
		"paused": {
			container.State{Status: "paused", Running: true, Paused: true, Pid: 7, StartedAt: started},
			running,
		},
	}
}

// exitedStates are states after the exit of a process.
func exitedStates() map[string]stateCase {
	exited := func(reason string, exitCode int32) model.Container {
		return model.Container{
			State:      runtimeapi.ContainerState_CONTAINER_EXITED,
			Reason:     reason,
			ExitCode:   exitCode,
			StartedAt:  readTime(started),
			FinishedAt: readTime(finished),
		}
	}
	short := exited("Completed", 0)
	short.StartedAt = short.FinishedAt

	return map[string]stateCase{
		"completed": {
			container.State{Status: "exited", StartedAt: started, FinishedAt: finished},
			exited("Completed", 0),
		},
		"failed": {
			container.State{Status: "exited", ExitCode: 3, StartedAt: started, FinishedAt: finished},
			exited("Error", 3),
		},
		"OOM-killed": {
			container.State{Status: "exited", ExitCode: 137, OOMKilled: true, StartedAt: started, FinishedAt: finished},
			exited("OOMKilled", 137),
		},
		"finished before its start": {
			container.State{Status: "exited", StartedAt: finished, FinishedAt: started},
			short,
		},
		"dead": {
			container.State{Status: "dead", Dead: true, ExitCode: 1, StartedAt: started, FinishedAt: finished},
			exited("Error", 1),
		},
	}
}

// failedStates are states after a failed start.
func failedStates() map[string]stateCase {
	const message = "no such file"
	failed := func(exitCode int32) model.Container {
		return model.Container{
			State:      runtimeapi.ContainerState_CONTAINER_EXITED,
			Reason:     "ContainerCannotRun",
			ExitCode:   exitCode,
			Message:    message,
			FinishedAt: created,
		}
	}
	late := failed(128)
	late.StartedAt, late.FinishedAt = readTime(started), readTime(finished)

	return map[string]stateCase{
		"start failed": {
			container.State{Status: "created", ExitCode: 127, Error: message, StartedAt: never, FinishedAt: never},
			failed(127),
		},
		"start failed with exit code 0": {
			container.State{Status: "created", Error: message},
			failed(128),
		},
		"error of the engine": {
			container.State{Status: "exited", Error: message, StartedAt: started, FinishedAt: finished},
			late,
		},
	}
}

func TestReadState(t *testing.T) {
	cases := aliveStates()
	maps.Copy(cases, exitedStates())
	maps.Copy(cases, failedStates())
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			got := read(t, inspect(typeContainer, c.in)).Container
			if got == nil {
				t.Fatal("not a container")
			}

			w := c.want
			if got.State != w.State || got.Reason != w.Reason || got.ExitCode != w.ExitCode ||
				got.Message != w.Message || got.Pid != w.Pid || !got.CreatedAt.Equal(created) ||
				!got.StartedAt.Equal(w.StartedAt) || !got.FinishedAt.Equal(w.FinishedAt) {
				t.Errorf("container %+v, want %+v", got, w)
			}

			checkTimes(t, got.Status(), w)
		})
	}
}

// checkTimes checks the times of a status: 0 if unset, and set after the exit.
func checkTimes(t *testing.T, s *runtimeapi.ContainerStatus, want model.Container) {
	t.Helper()
	isExited := want.State == runtimeapi.ContainerState_CONTAINER_EXITED
	if isExited && (s.StartedAt == 0 || s.FinishedAt < s.StartedAt) {
		t.Errorf("times after the exit: %v", s)
	}
	if want.StartedAt.IsZero() && s.StartedAt != 0 && !isExited || want.FinishedAt.IsZero() && s.FinishedAt != 0 {
		t.Errorf("an unset time is not 0: %v", s)
	}
}

// TestReadNeverPanics reads incomplete responses.
func TestReadNeverPanics(t *testing.T) {
	full := inspect(typeContainer, container.State{})
	for _, in := range []container.InspectResponse{
		{},
		{Name: full.Name},
		{Name: full.Name, Config: full.Config},
		{Name: full.Name, Config: full.Config, State: full.State},
		{Name: full.Name, Config: &container.Config{Labels: map[string]string{labelType: typeSandbox}}},
	} {
		_, _ = Read(in, model.ImageLabels{})
	}

	foreign := inspect(typeContainer, container.State{})
	foreign.Config.Labels = nil
	if o := read(t, foreign); o.Container != nil || o.Sandbox != nil {
		t.Errorf("container of another program: %+v", o)
	}
}

func TestMisfit(t *testing.T) {
	const good = "/k8s_main_web_default_u_3"

	for _, c := range []struct {
		name, kind string
		want       string // part of the result
	}{
		{good, typeContainer, ""},
		{good, typeSandbox, ""},
		{"/web", "", ""},
		{good, "", "not the label"},
		{"/renamed", typeContainer, "is not of the form"},
		{good, "volume", `"volume"`},
		{"/k8s_main_web_default_u_x", typeSandbox, "attempt"},
	} {
		t.Run(c.name+" "+c.kind, func(t *testing.T) {
			labels := map[string]string{}
			if c.kind != "" {
				labels[labelType] = c.kind
			}
			if got := Misfit(c.name, labels); (got == "") != (c.want == "") || !strings.Contains(got, c.want) {
				t.Errorf("Misfit() = %q, want %q", got, c.want)
			}
		})
	}
}
