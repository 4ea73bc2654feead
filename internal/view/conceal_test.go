package view

import (
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/engine/enginetest"
	"cri-dockerd/internal/model"
)

// TestConcealed follows a concealed pod to its reveal, and another one to its removal.
func TestConcealed(t *testing.T) {
	f := enginetest.NewFake()
	v := New(f, discard)
	v.Conceal(func(o model.Object) bool { return o.Sandbox != nil })
	runView(t, v)
	<-v.Synced()
	w := v.Watch()
	defer w.Stop()

	var ids []model.ContainerID
	for _, name := range []string{"revealed", "removed"} {
		ids = append(ids, model.ContainerID(makePod(t, f, name)))
	}

	for _, id := range ids {
		if err := f.Start(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		if err := v.Refresh(t.Context(), id); err != nil {
			t.Fatal(err)
		}

		if _, err := v.Sandbox(string(id)); err != nil || !v.IsConcealed(id) {
			t.Errorf("the record is missing (%v), or the pod is visible", err)
		}
		if p, err := v.Pod(string(id)); !errdefs.IsNotFound(err) {
			t.Errorf("Pod returned %v, %v; want NotFound", p, err)
		}
	}

	if err := f.Remove(t.Context(), ids[1]); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the removal", func() bool { return !v.IsConcealed(ids[1]) })

	select {
	case c := <-w.changes:
		t.Errorf("a concealed pod has the change %s", c.Type)
	case <-time.After(50 * time.Millisecond):
	}

	v.Reveal(ids[0])
	v.Reveal(ids[0])
	expect(t, w, string(ids[0]), "created started")
	if v.HasConcealed() || v.IsConcealed(ids[0]) {
		t.Error("a pod is still concealed")
	}
	if _, err := v.Pod(string(ids[0])); err != nil {
		t.Errorf("Pod: %v", err)
	}
}
