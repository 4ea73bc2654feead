package model

import (
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestContainerEvents applies events to a container. The original record must not change.
func TestContainerEvents(t *testing.T) {
	at := time.Unix(1700000000, 0)
	created := Object{Container: &Container{ID: digest}}
	running := created.WithStart(at)
	if c := running.Container; c.State != runtimeapi.ContainerState_CONTAINER_RUNNING || !c.StartedAt.Equal(at) {
		t.Errorf("after the start: %+v", c)
	}

	exited := running.WithExit(at.Add(time.Second), 137, false)
	if c := exited.Container; c.State != runtimeapi.ContainerState_CONTAINER_EXITED || c.ExitCode != 137 ||
		c.Reason != ReasonError || c.Pid != 0 || !c.FinishedAt.Equal(at.Add(time.Second)) {
		t.Errorf("after the exit: %+v", c)
	}

	if c := exited.WithOOMKill().Container; c.Reason != ReasonOOM || c.ExitCode != 137 {
		t.Errorf("after the OOM kill: %+v", c)
	}

	if c := created.Container; c.State != runtimeapi.ContainerState_CONTAINER_CREATED ||
		exited.Container.Reason != ReasonError {
		t.Errorf("a shared record has changed: %+v", c)
	}
}

func TestSandboxEvents(t *testing.T) {
	at := time.Unix(1700000000, 0)
	created := Object{Sandbox: &Sandbox{ID: digest, NeverStarted: true}}
	running := created.WithStart(at)
	if s := running.Sandbox; !s.Ready() || s.NeverStarted || !s.StartedAt.Equal(at) {
		t.Errorf("after the start: %+v", s)
	}

	exited := running.WithExit(at.Add(time.Second), 2, false)
	if s := exited.Sandbox; s.Ready() || s.ExitCode != 2 || !s.FinishedAt.Equal(at.Add(time.Second)) {
		t.Errorf("after the exit: %+v", s)
	}

	if !created.Sandbox.NeverStarted || !running.Sandbox.Running {
		t.Error("a shared record has changed")
	}
}

func TestObjectID(t *testing.T) {
	tests := map[string]Object{
		"sandbox":   {Sandbox: &Sandbox{ID: digest}},
		"container": {Container: &Container{ID: digest}},
		"unread":    {Unread: digest},
	}

	for name, o := range tests {
		t.Run(name, func(t *testing.T) {
			if id := o.ID(); id != digest {
				t.Errorf("ID %q", id)
			}
		})
	}

	if id := (Object{}).ID(); id != "" {
		t.Errorf("ID %q of an empty object", id)
	}
}

func TestNetworkOfSandbox(t *testing.T) {
	node := &runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_NODE}
	tests := map[string]struct {
		sandbox       Sandbox
		isEngine      bool
		isUnconnected bool
		isHostNetwork bool
	}{
		"host network":  {Sandbox{NetworkMode: "host", Namespaces: node}, false, false, true},
		"own namespace": {Sandbox{NetworkMode: "host", OwnNetNS: true}, false, false, false},
		"plugin":        {Sandbox{NetworkMode: NetworkMode(true)}, false, true, false},
		"no-op network": {Sandbox{NetworkMode: NetworkMode(false)}, true, false, false},
		"unknown":       {Sandbox{}, false, false, false},
	}

	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			s := &test.sandbox
			if s.EngineNetwork() != test.isEngine || s.IsWithoutNetwork() != test.isUnconnected ||
				s.HostNetwork() != test.isHostNetwork {
				t.Errorf("engine network %v, without network %v, host network %v", s.EngineNetwork(),
					s.IsWithoutNetwork(), s.HostNetwork())
			}
		})
	}
}
