package check

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/check/probe"
	"cri-dockerd/internal/engine"
)

const (
	// eventualTimeout limits the wait for asynchronous effects: a listening program, a log line.
	eventualTimeout = 15 * time.Second
	// logParent is neither /tmp, where the daemon may have a private mount, nor /var/log/pods,
	// which the kubelet cleans up.
	logParent = "/var/log"
	uidLabel  = "io.kubernetes.pod.uid"
)

// podTest is one run of the self-test.
type podTest struct {
	cri    runtimeapi.RuntimeServiceClient
	images runtimeapi.ImageServiceClient
	docker *engine.Engine
	image  string
	pod    *runtimeapi.PodSandboxConfig

	ran                    bool // RunPodSandbox was called
	podID, containerID, ip string
}

// runPod runs the self-test through the daemon at endpoint. It always removes the pod and its
// image.
func runPod(ctx context.Context, endpoint string, docker engine.Config, out io.Writer) (err error) {
	t, closeAll, err := newPodTest(endpoint, docker)
	if err != nil {
		return err
	}
	defer closeAll()
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stepTimeout)
		defer cancel()
		if cleanErr := t.clean(ctx); cleanErr != nil {
			err = errors.Join(err, fmt.Errorf("clean up: %w", cleanErr))
		}
	}()

	return run(ctx, out, t.steps())
}

func newPodTest(endpoint string, config engine.Config) (*podTest, func(), error) {
	conn, err := probe.Dial(endpoint)
	if err != nil {
		return nil, nil, err
	}

	docker, err := engine.New(config)
	if err != nil {
		return nil, nil, errors.Join(err, conn.Close())
	}

	dir, err := os.MkdirTemp(logParent, "cri-dockerd-check-")
	if err != nil {
		return nil, nil, errors.Join(err, conn.Close(), docker.Close())
	}

	b := make([]byte, 5)
	_, _ = rand.Read(b) // never fails
	id := hex.EncodeToString(b)
	t := &podTest{
		cri:    runtimeapi.NewRuntimeServiceClient(conn),
		images: runtimeapi.NewImageServiceClient(conn),
		docker: docker,
		image:  "cri-dockerd.local/check:" + id,
		pod: &runtimeapi.PodSandboxConfig{
			Metadata: &runtimeapi.PodSandboxMetadata{
				Name:      "check-" + id,
				Namespace: "cri-dockerd",
				Uid:       "check-" + id,
			},
			Labels:       map[string]string{uidLabel: "check-" + id},
			Hostname:     "check-" + id,
			LogDirectory: dir,
			Linux:        &runtimeapi.LinuxPodSandboxConfig{},
		},
	}

	return t, func() {
		_ = conn.Close()
		_ = docker.Close()
		_ = os.RemoveAll(dir)
	}, nil
}

// clean removes the pod and the image, if they exist.
func (t *podTest) clean(ctx context.Context) error {
	var errs []error
	if t.ran { // by label, not by ID: a failed call may have created a pod
		pods, err := t.cri.ListPodSandbox(ctx,
			&runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{LabelSelector: t.pod.Labels}})
		errs = append(errs, err)
		for _, p := range pods.GetItems() {
			_, err := t.cri.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.Id})
			errs = append(errs, err)
		}
	}

	if _, err := t.docker.Host(ctx); err != nil {
		return errors.Join(errs...) // Docker is not running, and there is no image to remove
	}

	if err := t.docker.RemoveImage(ctx, t.image); !errdefs.IsNotFound(err) {
		errs = append(errs, err)
	}

	return errors.Join(errs...)
}
