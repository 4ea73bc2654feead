package e2e

import (
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
	"cri-dockerd/test/registry"
)

const imagePod = `apiVersion: v1
kind: Pod
metadata: {name: NAME, namespace: default}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: IMAGE
    imagePullPolicy: POLICY
    command: [sleep, "100000"]
`

const volumePod = `apiVersion: v1
kind: Pod
metadata: {name: volume, namespace: default}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: cri-test/busybox:latest
    imagePullPolicy: Never
    command: [sh, -c, "cat /whole/dir/file /part/file; sleep 100000"]
    volumeMounts: [{name: data, mountPath: /whole}, {name: data, mountPath: /part, subPath: dir}]
  volumes: [{name: data, image: {reference: IMAGE, pullPolicy: IfNotPresent}}]
`

// busybox pushes an image with a shell to the registry, of an ID of its own, and removes it from
// the engine.
func (k *kubelet) busybox(t *testing.T, r *registry.Registry, repository string) string {
	t.Helper()
	ref := r.Host + "/" + repository + ":1"
	script := `set -e
		export DOCKER_HOST=$1 DOCKER_BUILDKIT=0
		printf 'FROM cri-test/busybox:latest\nLABEL repository=%s\n' $2 | docker build -q -t $2 -
		docker push -q $2
		docker rmi $2`
	if out, err := k.engine.Command("sh", "-c", script, "sh", "unix://"+k.engine.Socket, ref).CombinedOutput(); err !=
		nil {
		t.Fatalf("%v\n%s", err, out)
	}

	return ref
}

func (k *kubelet) hasImage(t *testing.T, ref string) bool {
	t.Helper()
	r, err := k.daemon.Image.ImageStatus(t.Context(),
		&runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
	if err != nil {
		t.Fatal(err)
	}
	return r.Image != nil
}

// TestKubeletImages: pull policies, an image volume, and the kubelet's garbage collection, which
// leaves the sandbox image.
func TestKubeletImages(t *testing.T) {
	for _, v := range engines.Versions() {
		t.Run(string(v), func(t *testing.T) {
			t.Parallel()
			k := prepare(t, v, "--pinned-image-labels=team=platform")
			r := registry.Serve(t, k.engine.Listen(t, "127.0.0.1:0"))
			unused, pinned := k.unused(t, r.Add(t, "unused", "1", 1, 1000))
			// Any disk is fuller than one per cent.
			k.run(t, strings.Replace(k.config, "imageGCHighThresholdPercent: 100",
				"imageGCHighThresholdPercent: 1\nimageGCLowThresholdPercent: 0\nimageMinimumGCAge: 1s", 1))
			apply := func(name, image, policy string) {
				t.Helper()
				k.apply(t, name, strings.NewReplacer("NAME", name, "IMAGE", image, "POLICY", policy).Replace(imagePod))
			}

			app := k.busybox(t, r, "app")
			apply("always", app, "Always")
			k.waitRunning(t, "always")
			r.Set("app", registry.Rule{Status: 404, Code: "MANIFEST_UNKNOWN"})
			apply("present", app, "IfNotPresent")
			apply("never", app, "Never")
			apply("again", app, "Always")
			apply("absent", r.Host+"/absent:1", "Never")
			k.waitRunning(t, "present")
			k.waitRunning(t, "never")
			k.waits(t, "again", "ErrImagePull", "ImagePullBackOff")
			k.waits(t, "absent", "ErrImageNeverPull")

			data := r.Put(t, "data", "1", registry.Files(t, map[string]string{"dir/file": "of the image\n"}))
			k.apply(t, "volume", strings.Replace(volumePod, "IMAGE", data, 1))
			k.waitRunning(t, "volume")
			eventually(t, "the image's file is read", func() error {
				text, err := k.get("/containerLogs/default/volume-node/main")
				if err == nil && text != "of the image\nof the image\n" {
					err = fmt.Errorf("%q", text)
				}
				return err
			})

			within(t, gcPeriod+time.Minute, "an image that nobody uses is collected", func() error {
				if k.hasImage(t, unused) {
					return errors.New("it is there")
				}
				return nil
			})

			for _, i := range append(pinned, app) {
				if !k.hasImage(t, i) {
					t.Errorf("%s, which is pinned or used, was collected", i)
				}
			}
		})
	}
}

// waits waits until a pod's container waits for one of these reasons.
func (k *kubelet) waits(t *testing.T, name string, reasons ...string) {
	t.Helper()
	eventually(t, name+" waits", func() error {
		c := k.pod(t, name).container("main")
		for _, r := range reasons {
			if c.State.Waiting != nil && c.State.Waiting.Reason == r {
				return nil
			}
		}
		return fmt.Errorf("%+v", c)
	})
}

// unused brings images that no pod uses, without the kubelet, and returns their IDs: one that was
// pulled, and those that are pinned, which are the sandbox image and one that was built with the
// label of --pinned-image-labels.
func (k *kubelet) unused(t *testing.T, ref string) (image string, pinned []string) {
	t.Helper()
	const build = "printf 'FROM scratch\nLABEL team=platform\nCMD /none\n' | DOCKER_BUILDKIT=0 docker -H $1 build " +
		"-t built/pinned:1 -"
	if out, err := k.engine.Command("sh", "-c", build, "sh", "unix://"+k.engine.Socket).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}

	p, err := k.daemon.Image.PullImage(t.Context(),
		&runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
	if err != nil {
		t.Fatal(err)
	}

	pod, err := k.daemon.Runtime.RunPodSandbox(t.Context(),
		&runtimeapi.RunPodSandboxRequest{Config: &runtimeapi.PodSandboxConfig{
			Metadata: &runtimeapi.PodSandboxMetadata{
				Name:      "first",
				Namespace: "default",
				Uid:       "first",
			}, Linux: &runtimeapi.LinuxPodSandboxConfig{CgroupParent: k.engine.CgroupParent},
		}})
	if err != nil {
		t.Fatal(err)
	}

	if _, err := k.daemon.Runtime.RemovePodSandbox(t.Context(),
		&runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod.PodSandboxId}); err != nil {
		t.Fatal(err)
	}

	l, err := k.daemon.Image.ListImages(t.Context(), &runtimeapi.ListImagesRequest{})
	if err != nil {
		t.Fatal(err)
	}

	for _, i := range l.Images {
		if i.Pinned {
			pinned = append(pinned, i.Id)
		}
	}

	if len(pinned) != 2 {
		t.Errorf("pinned: %v", pinned)
	}

	return p.ImageRef, pinned
}

// gcPeriod is how often the kubelet collects images; it takes those that it has seen the time
// before.
const gcPeriod = 5 * time.Minute

// TestKubeletPullSecret: a pod with the secret of a registry pulls from it and another one with it
// uses what was pulled; a pod without it does not get the image, though it is there
// (KubeletEnsureSecretPulledImages).
func TestKubeletPullSecret(t *testing.T) {
	for _, v := range engines.Versions() {
		t.Run(string(v), func(t *testing.T) {
			t.Parallel()
			k := prepare(t, v)
			r := registry.Serve(t, k.engine.Listen(t, "127.0.0.1:0"))
			private := k.busybox(t, r, "private")
			r.Set("", registry.Rule{User: "user", Password: "secret"})
			config := `{"auths":{"` + r.Host + `":{"username":"user","password":"secret"}}}`
			pod := func(name string, secrets ...object) object {
				return object{
					"kind": "Pod", "apiVersion": "v1", "metadata": object{
						"name":            name,
						"namespace":       "default",
						"uid":             "uid-" + name,
						"resourceVersion": "1",
					},
					"spec": object{
						"nodeName": "node", "automountServiceAccountToken": false, "enableServiceLinks": false,
						"securityContext": object{}, "terminationGracePeriodSeconds": 1, "imagePullSecrets": secrets,
						"restartPolicy": "Always", "dnsPolicy": "Default",
						"containers": []object{{
							"name":            "main",
							"image":           private,
							"imagePullPolicy": "IfNotPresent",
							"command":         []string{"sleep", "100000"},
						}},
					},
					"status": object{"phase": "Pending"},
				}
			}

			room := object{"pods": "10", "cpu": "2", "memory": "8Gi", "ephemeral-storage": "10Gi"}
			api, kubeconfig := k.serveAPI(t, map[string][]object{
				"/api/v1/nodes": {{
					"kind": "Node", "apiVersion": "v1", "metadata": object{"name": "node", "resourceVersion": "1"},
					"status": object{
						"conditions": []object{{"type": "Ready", "status": "True"}}, "capacity": room,
						"allocatable": room,
					},
				}},
				"/api/v1/namespaces/default/pods": {pod("first", object{"name": "login"}),
					pod("second", object{"name": "login"}), pod("stranger")},
				"/api/v1/namespaces/default/secrets": {{
					"kind": "Secret", "apiVersion": "v1", "metadata": object{
						"name":            "login",
						"namespace":       "default",
						"resourceVersion": "1",
					},
					"type": "kubernetes.io/dockerconfigjson",
					"data": object{".dockerconfigjson": base64.StdEncoding.EncodeToString([]byte(config))},
				}},
			})

			k.run(t, k.config+"contentType: application/json\nconfigMapAndSecretChangeDetectionStrategy: Get\n"+
				"imagePullCredentialsVerificationPolicy: AlwaysVerify\n", kubeconfig)
			runs := func(pod string) error {
				l, err := k.daemon.Runtime.ListContainers(t.Context(),
					&runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{
						LabelSelector: map[string]string{"io.kubernetes.pod.name": pod},
						State: &runtimeapi.ContainerStateValue{
							State: runtimeapi.ContainerState_CONTAINER_RUNNING,
						},
					}})
				if err == nil && len(l.Containers) != 1 {
					err = fmt.Errorf("containers of %s: %v", pod, l.Containers)
				}

				return err
			}

			for _, name := range []string{"first", "second"} {
				eventually(t, name+" runs", func() error { return runs(name) })
			}

			if !k.hasImage(t, private) {
				t.Error("the image is not there")
			}

			eventually(t, "the pod without the secret is refused", func() error {
				if !api.said("stranger", "Failed to pull image") {
					return fmt.Errorf("no event of it yet")
				}
				return nil
			})

			if runs("stranger") == nil {
				t.Error("a pod without the secret runs the private image")
			}
		})
	}
}
